"use strict";
// Whatever comes from targets is written as text, never as markup.
const HISTORY = 600;
const EVENTS = 200;
const state = { targets: [], chosen: 0, rows: [], charts: null, data: null, late: [], ready: false, waiting: [], number: 0 };
const element = (id) => document.getElementById(id);

const clock = (s) => new Date(s * 1000).toLocaleTimeString([], { hour12: false });
const ms = (value) => (value === null ? "-" : value.toFixed(Math.abs(value) < 10 ? 2 : 0) + " ms");
const percent = (value) => (value === null ? "-" : (value * 100).toFixed(1) + " %");

function row(at) {
  const tr = document.createElement("tr");
  tr.tabIndex = 0;
  const cells = Array.from({ length: 9 }, () => tr.appendChild(document.createElement("td")));
  cells[2].className = "state";
  for (const number of [4, 5, 6, 7]) cells[number].className = "number";
  tr.addEventListener("click", () => choose(at));
  tr.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(at); });
  element("targets").appendChild(tr);
  return cells;
}

function show(at, target) {
  state.targets[at] = target;
  const cells = (state.rows[at] ??= row(at));
  const isHost = target.role === "host";
  const texts = [
    target.name, target.role, isHost ? "-" : target.mood, isHost ? "" : clock(target.since_s),
    isHost ? "" : target.likelihood.toFixed(3), ms(target.rtt_ms), percent(target.loss), ms(target.offset_ms), target.why,
  ];
  texts.forEach((text, column) => { if (cells[column].textContent !== text) cells[column].textContent = text; });
  cells[0].title = target.address;
  cells[2].className = isHost ? "state" : "state " + target.mood;
}

function happened(event) {
  // What is in the status comes once more if it happened meanwhile.
  if (event.number <= state.number) return;
  state.number = event.number;
  const list = element("events");
  const item = document.createElement("li");
  const time = item.appendChild(document.createElement("time"));
  time.textContent = clock(event.time_s);
  const who = item.appendChild(document.createElement("b"));
  who.textContent = event.target ?? "watcher";
  const what = item.appendChild(document.createElement("span"));
  what.textContent = event.text;
  what.className = event.mood;
  list.prepend(item);
  while (list.childElementCount > EVENTS) list.lastElementChild.remove();
}

function chart(id, title, series, range) {
  const cursor = { sync: { key: "watch" } };
  const axes = [{ stroke: "#888", grid: { stroke: "#8884" } }, { stroke: "#888", grid: { stroke: "#8884" }, size: 64 }];
  const hidden = { show: false, scale: "lost" };
  const scales = { x: { time: true }, y: { range }, lost: { range: () => [0, 1] } };
  const options = { width: element(id).clientWidth || 800, height: 180, title, cursor, axes: [...axes, hidden], scales, series: [{}, ...series] };
  return new uPlot(options, [[], ...series.map(() => [])], element(id));
}

function makeCharts() {
  const lost = { label: "lost", scale: "lost", stroke: "#d33", fill: "#d336", width: 1, paths: uPlot.paths.bars({ size: [1, 100] }), points: { show: false }, value: (_, v) => v ?? "-" };
  const line = (label, stroke) => ({ label, stroke, width: 1.5, spanGaps: false, points: { size: 3 }, value: (_, v) => (v === null || v === undefined ? "-" : v.toFixed(3)) });
  state.charts = {
    rtt: chart("rtt", "round trip, ms (longest of each second)", [line("ms", "#48c"), lost], (_, low, high) => [0, high > 0 ? high * 1.1 : 1]),
    offset: chart("offset", "clock less ours, ms", [line("ms", "#2a7")], (_, low, high) => (low === null ? [-1, 1] : [low - 1, high + 1])),
    likelihood: chart("likelihood", "likelihood of a migration", [line("probability", "#c80")], () => [0, 1]),
  };
  addEventListener("resize", () => {
    for (const [id, of] of Object.entries(state.charts)) of.setSize({ width: element(id).clientWidth, height: 180 });
  });
}

function push(data, second) {
  const last = data.time[data.time.length - 1];
  // A second without any probe is a gap too.
  for (let missing = last + 1; last !== undefined && missing < second.time_s && missing < last + HISTORY; missing++) {
    add(data, { time_s: missing, rtt_ms: null, lost: 0, offset_ms: null, likelihood: null });
  }
  if (last === undefined || second.time_s > last) add(data, second);
}

function add(data, second) {
  data.time.push(second.time_s);
  data.rtt.push(second.lost > 0 ? null : second.rtt_ms);
  data.lost.push(second.lost > 0 ? 1 : null);
  data.offset.push(second.offset_ms);
  data.likelihood.push(second.likelihood);
  for (const column of Object.values(data)) while (column.length > HISTORY) column.shift();
}

function draw() {
  const data = state.data;
  if (!data) return;
  // Clocks may be read more seldom than once a second: between two readings a line is no invention, but where probes were lost.
  const read = data.offset.map((value, at) => (value === null && data.lost[at] !== 1 ? undefined : value));
  state.charts.rtt.setData([data.time, data.rtt, data.lost]);
  state.charts.offset.setData([data.time, read]);
  state.charts.likelihood.setData([data.time, data.likelihood]);
}

async function choose(at) {
  state.chosen = at;
  // What comes while the past is fetched waits for it.
  state.data = null;
  state.late = [];
  element("chosen").textContent = state.targets[at].name;
  state.rows.forEach((cells, row) => cells[0].parentElement.classList.toggle("chosen", row === at));
  const past = await (await fetch("api/history?target=" + at)).json();
  if (state.chosen !== at) return;
  const data = { time: [], rtt: [], lost: [], offset: [], likelihood: [] };
  past.concat(state.late).forEach((second) => push(data, second));
  state.data = data;
  draw();
}

function says(text, mood) {
  element("link").textContent = text;
  element("link").className = mood;
}

function counted() {
  const alarms = state.targets.filter((target) => target.role === "vm" && target.mood === "alarm").length;
  document.title = alarms > 0 ? `(${alarms}) Palanquin watch` : "Palanquin watch";
}

async function begin() {
  if (!state.charts) makeCharts();
  const status = await (await fetch("api/status")).json();
  status.targets.forEach((target, at) => show(at, target));
  state.number = 0;
  element("events").replaceChildren();
  status.events.forEach(happened);
  await choose(state.chosen);
  counted();
  state.ready = true;
  state.waiting.splice(0).forEach(seconds);
}

function seconds(message) {
  // What comes before the status is known waits for it.
  if (!state.ready) {
    state.waiting.push(message);
    return;
  }
  if (message.event) happened(message.event);
  for (const { target, second, shown } of message.seconds) {
    show(target, shown);
    if (target !== state.chosen) continue;
    if (state.data) push(state.data, second);
    else state.late.push(second);
  }
  counted();
  draw();
}

function listen() {
  const source = new EventSource("api/events");
  const live = (of) => says(of.stalls > 0 ? `live; the watcher has stalled ${of.stalls} times, ${of.stalled_s.toFixed(1)} s in all` : "live", "calm");
  source.addEventListener("open", () => {
    state.ready = false;
    state.waiting = [];
    says("live", "calm");
    begin().catch((error) => says(String(error), "alarm"));
  });
  source.addEventListener("error", () => says("not connected: what is shown is old", "alarm"));
  source.addEventListener("happened", (event) => { if (state.ready) happened(JSON.parse(event.data)); else state.waiting.push({ seconds: [], event: JSON.parse(event.data) }); });
  source.addEventListener("seconds", (event) => {
    const message = JSON.parse(event.data);
    live(message);
    seconds(message);
  });
}

listen();
