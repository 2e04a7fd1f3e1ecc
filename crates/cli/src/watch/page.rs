//! The page that shows what is watched, and the metrics. It takes no command.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::extract::{Query, Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use palanquin_api::control::ErrorKind;
use palanquin_host::probe::Prober;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;

use super::board::Second;
use super::live::{Shared, held};
use super::metrics;
use crate::failure::Failure;

/// Most viewers at a time.
const VIEWERS_MAX: usize = 32;
/// Messages that wait for a viewer; who is slower is cut off, and comes again by itself.
const WAITING_MAX: usize = 256;
/// Most connections at a time; later ones wait.
const CONNECTIONS_MAX: usize = 2 * VIEWERS_MAX;
/// Longest time for the head of a request, and without any.
const HEAD_WAIT: Duration = Duration::from_secs(10);
/// Longest life of a connection: a viewer comes again by itself, and who takes nothing keeps no place.
const CONNECTION_MAX: Duration = Duration::from_secs(3600);
/// Longest request's head, in bytes.
const HEAD_MAX: usize = 16 << 10;
/// If no connection can be taken, for example because there are too many files, it is tried again after that.
const ACCEPT_AGAIN: Duration = Duration::from_millis(200);
/// Nothing from elsewhere, nothing written into the page, and no frame around it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const INDEX: &str = include_str!("page/index.html");
const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = include_str!("page/page.js");
/// uPlot 1.6.32; its licence is beside it.
const UPLOT: &str = include_str!("page/uPlot.iife.min.js");
const UPLOT_STYLE: &str = include_str!("page/uPlot.min.css");

type Viewer = mpsc::Sender<Result<Event, Infallible>>;

/// What is served, and to whom.
#[derive(Clone)]
pub(crate) struct Page {
    board: Shared,
    prober: Arc<Prober>,
    viewers: Arc<Mutex<Vec<Viewer>>>,
}

/// Takes the address.
pub(crate) async fn bind(listen: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(listen).await.map_err(|error| {
        let failure = |kind| Failure::new(kind, format!("the page can't be served at {listen}"));
        match error.kind() {
            std::io::ErrorKind::AddrInUse => failure(ErrorKind::Blocked)
                .cause(error)
                .hint("another program listens there: `ss -ltnp` says which; or choose another port for `listen`"),
            std::io::ErrorKind::AddrNotAvailable => failure(ErrorKind::Usage)
                .cause(error)
                .hint("`listen` is an address of this machine: `ip address` lists them"),
            std::io::ErrorKind::PermissionDenied => failure(ErrorKind::Blocked)
                .cause(error)
                .hint("ports below 1024 need root: choose another for `listen`"),
            _ => failure(ErrorKind::Internal).cause(error),
        }
    })
}

/// Serves until the program ends.
pub(crate) async fn serve(listener: TcpListener, page: Page) {
    let router = router(page);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            sleep(ACCEPT_AGAIN).await;
            continue;
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_WAIT)
                .max_buf_size(HEAD_MAX)
                .serve_connection(TokioIo::new(stream), service);
            // How it ended concerns nobody but its viewer.
            let _ = timeout(CONNECTION_MAX, connection).await;
            drop(place);
        });
    }
}

fn router(page: Page) -> Router {
    let text = |kind: &'static str, text: &'static str| {
        get(move || async move { ([(header::CONTENT_TYPE, kind)], text) })
    };
    let script = "text/javascript; charset=utf-8";
    let style = "text/css; charset=utf-8";
    Router::new()
        .route("/", text("text/html; charset=utf-8", INDEX))
        .route("/page.js", text(script, SCRIPT))
        .route("/page.css", text(style, STYLE))
        .route("/uplot.js", text(script, UPLOT))
        .route("/uplot.css", text(style, UPLOT_STYLE))
        .route("/api/status", get(status))
        .route("/api/history", get(history))
        .route("/api/events", get(events))
        .route("/metrics", get(numbers))
        .layer(middleware::from_fn(guard))
        .with_state(page)
}

/// Every answer is for this page only. A name in `Host` that is none of this machine comes from a page elsewhere whose name
/// was pointed here; other pages may link here, and get nothing else.
async fn guard(request: Request, next: Next) -> Response {
    if !is_own(request.headers()) {
        let why = "this page is reached by an address, or by localhost\n";
        return (StatusCode::MISDIRECTED_REQUEST, why).into_response();
    }
    if request.uri().path() != "/" && is_of_another_page(request.headers()) {
        let why = "this is for the page at / only\n";
        return (StatusCode::FORBIDDEN, why).into_response();
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Whether a browser says that another page asks. Otherwise any page could take all places of viewers.
fn is_of_another_page(headers: &HeaderMap) -> bool {
    headers
        .get("sec-fetch-site")
        .is_some_and(|site| site != "same-origin" && site != "none")
}

fn is_own(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).map(HeaderValue::as_bytes);
    let Some(host) = host.and_then(|host| Authority::try_from(host).ok()) else {
        return false;
    };
    let name = host.host().trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse::<IpAddr>().is_ok()
}

async fn status(State(page): State<Page>) -> Json<Value> {
    let board = held(&page.board);
    Json(json!({
        "now_s": page.prober.clock().now_us() as f64 / 1e6,
        "targets": board.targets,
        "events": board.events,
        "stalls": board.stalls,
        "stalled_s": board.stalled_s,
        "calibration": "mostly synthetic",
    }))
}

#[derive(Deserialize)]
struct Wanted {
    target: usize,
}

async fn history(State(page): State<Page>, Query(wanted): Query<Wanted>) -> Response {
    let board = held(&page.board);
    match board.targets.get(wanted.target) {
        Some(target) => Json(&target.history).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn numbers(State(page): State<Page>) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let text = metrics::render(&held(&page.board), &page.prober);
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

async fn events(State(page): State<Page>) -> Response {
    let (sender, receiver) = mpsc::channel(WAITING_MAX);
    {
        let mut viewers = page.viewers.lock().unwrap_or_else(PoisonError::into_inner);
        viewers.retain(|viewer| !viewer.is_closed());
        if viewers.len() >= VIEWERS_MAX {
            let why = format!("there are {VIEWERS_MAX} viewers already\n");
            return (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
        }
        viewers.push(sender);
    }
    Sse::new(ReceiverStream::new(receiver))
        .keep_alive(KeepAlive::default())
        .into_response()
}

impl Page {
    pub(crate) fn new(board: Shared, prober: Arc<Prober>) -> Self {
        Self {
            board,
            prober,
            viewers: Arc::default(),
        }
    }

    /// Sends something to all viewers.
    pub(crate) fn send(&self, name: &str, value: &impl Serialize) {
        let mut viewers = self.viewers.lock().unwrap_or_else(PoisonError::into_inner);
        if viewers.is_empty() {
            return;
        }
        let Ok(event) = Event::default().event(name).json_data(value) else {
            return;
        };
        viewers.retain(|viewer| viewer.try_send(Ok(event.clone())).is_ok());
    }

    /// Sends what is new of targets: seconds that are over, and how targets are.
    pub(crate) fn seconds(&self, closed: &[(usize, Second)]) {
        if closed.is_empty() {
            return;
        }
        let value = {
            let board = held(&self.board);
            let of = |(at, second): &(usize, Second)| {
                let target = board.targets.get(*at)?;
                Some(json!({ "target": at, "second": second, "shown": target }))
            };
            json!({
                "now_s": self.prober.clock().now_us() as f64 / 1e6,
                "stalls": board.stalls,
                "stalled_s": board.stalled_s,
                "seconds": closed.iter().filter_map(of).collect::<Vec<_>>(),
            })
        };
        self.send("seconds", &value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_and_localhost_name_this_page() {
        let own = |host: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_static(host));
            is_own(&headers)
        };
        for host in [
            "localhost",
            "localhost:9810",
            "127.0.0.1",
            "127.0.0.1:1",
            "[::1]:9810",
            "[::1]",
        ] {
            assert!(own(host), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:9810",
            "localhost.evil.example",
            "",
        ] {
            assert!(!own(host), "{host}");
        }
        assert!(!is_own(&HeaderMap::new()));
    }

    #[test]
    fn what_another_page_asks_for_is_told_from_what_this_one_or_a_person_does() {
        let another = |site: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("sec-fetch-site", HeaderValue::from_static(site));
            is_of_another_page(&headers)
        };
        assert!(another("cross-site") && another("same-site"));
        assert!(!another("same-origin") && !another("none"));
        assert!(!is_of_another_page(&HeaderMap::new()));
    }

    #[test]
    fn the_page_brings_everything_with_it_and_writes_no_markup() {
        for text in [INDEX, STYLE, SCRIPT] {
            assert!(!text.contains("http://") && !text.contains("https://"));
        }
        for way in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
        ] {
            assert!(!SCRIPT.contains(way), "{way}");
        }
        assert!(!INDEX.contains("style=") && !INDEX.contains("onclick"));
    }
}
