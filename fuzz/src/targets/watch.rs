//! Recorded observations, and records of what was ordered: what an operator gives to the detector.

use palanquin_watch::trace::Replay;
use palanquin_watch::{Calibration, Ledger, Level, Record};

use super::{seeds_of, within, words_of};
use crate::entry::Target;

/// Traces of lines; the first says what was ordered.
pub(crate) const WATCH: Target = Target::new("watch", watch, || {
    let steady: String = (0..90)
        .map(|second| format!("{second},web,rtt_ms,{}\n", 1 + second % 3))
        .collect();
    seeds_of(&[
        "m a b 0 60\ntime_s,target,kind,value\n0,web,rtt_ms,0.4\n0.5,web,lost,\n8,web,offset_ms,-0.2\n9,a,ttl,60\n10,web,announced,1\n",
        "m a b 9 8\n1e9,web,rtt_ms,3600000\n0,web,lost,1\n9999999999,a,icmp_offset_ms,-4.3e12\n",
        "nan inf -1 1e300 x\n0,web,offset_ms,NaN\n",
        &format!("m a b 80 99\n{steady}95,web,rtt_ms,9\n96,web,lost,\n97,web,lost,\n98,web,lost,\n99,web,rtt_ms,1\n99,web,announced,\n"),
        &format!("\n{steady}100,other,lost,\n4000,web,rtt_ms,1\n4000.5,web,rtt_ms,500\n"),
    ])
})
.words(|| {
    words_of(&[
        ",web,", ",a,", ",b,", "rtt_ms,", "lost,", "offset_ms,", "icmp_offset_ms,", "ttl,", "announced,", "\n", "1e9", "-0.1",
    ])
});

fn watch(data: &[u8]) {
    // Each target may keep that much, and a line that much.
    let targets = data.split(|byte| *byte == b'\n').count().min(1024);
    within(targets * (64 << 10) + (1 << 20), || replay(data));
}

fn replay(data: &[u8]) {
    let mut lines = data.split(|byte| *byte == b'\n');
    let order = String::from_utf8_lossy(lines.next().unwrap_or_default()).into_owned();
    let words: Vec<&str> = order.split(' ').collect();
    let mut ledger = Ledger::new();
    let mut ordered = None;
    if let [id, source, destination, from_s, to_s] = words[..]
        && let (Ok(from_s), Ok(to_s)) = (from_s.parse(), to_s.parse())
    {
        let record = Record {
            id: id.to_owned(),
            vm: "web".to_owned(),
            source: source.to_owned(),
            destination: destination.to_owned(),
            from_s,
            to_s,
        };
        if ledger.add(record.clone()).is_ok() {
            assert!(from_s <= to_s && source != destination);
            ordered = Some(record);
        }
    }
    let mut replay = Replay::new(
        Calibration::built_in(),
        vec!["a".to_owned(), "b".to_owned()],
    );
    for line in lines {
        let before = replay.observations;
        if replay.line(line).is_err() {
            assert_eq!(replay.observations, before, "what is refused was not taken");
        }
    }
    replay.watcher.finish();
    let mut explained = false;
    while let Some(finding) = replay.watcher.poll() {
        assert!((0.0..=1.0).contains(&finding.likelihood) && finding.score.is_finite());
        assert!(finding.onset_s <= finding.time_s);
        assert!(finding.level < Level::Alarm || finding.break_s.is_some());
        assert!(finding.hosts.iter().all(|host| host == "a" || host == "b"));
        assert!(finding.evidence.iter().all(|of| of.value.is_finite()));
        let joined = ledger.judge(finding);
        if joined.finding.level > Level::Note && !joined.verdict.is_unexplained() {
            let record = ordered.as_ref().expect("only a record explains");
            assert_eq!(joined.finding.target, record.vm);
            explained = true;
        }
    }
    let unconfirmed = ledger.finish(|_| true);
    assert_eq!(
        unconfirmed.len(),
        usize::from(ordered.is_some() && !explained)
    );
}
