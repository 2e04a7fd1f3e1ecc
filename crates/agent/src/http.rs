//! The control and observe sockets.
//!
//! Two UNIX sockets, because what observes must not control: the observe socket has no route that changes
//! anything, and everybody on the host may read it. The control socket is for root, the agent's own user, and whom the
//! configuration names as operators.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path as UrlPath, Query, State};
use axum::http::StatusCode;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::serve::IncomingStream;
use axum::{Json, Router};
use palanquin_api::advertisement::{AcceptAdvertisement, MakeAdvertisement, PardonHost};
use palanquin_api::control::{
    AdoptVm, ApiError, DoctorRequest, ErrorKind, GivePassport, MigrationInfo, ResolveMigration,
    RunVm, StartMigration,
};
use serde::Deserialize;
use serde_json::Value;
use tokio::net::{UnixListener, UnixStream};
use uuid::Uuid;

use crate::agent::Agent;
use crate::gate::Caller;
use crate::metrics;
use crate::operations::error;
use crate::verbs::{ControlVerb, Method, Socket};

/// Longest request.
const BODY_MAX: usize = 256 * 1024;
/// Longest wait of a watcher for news.
const WATCH_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the observe socket's events are looked for.
const EVENT_TICK: Duration = Duration::from_millis(500);

struct Failed(ApiError);

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let status = match self.0.kind {
            ErrorKind::Usage => StatusCode::BAD_REQUEST,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Refused => StatusCode::FORBIDDEN,
            ErrorKind::Blocked | ErrorKind::Aborted | ErrorKind::InDoubt => StatusCode::CONFLICT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self.0)).into_response()
    }
}

type Answer = Result<Json<Value>, Failed>;

/// Runs something that blocks, away from the threads that serve.
async fn blocking<T: serde::Serialize + Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Answer {
    let internal = |message: String| Failed(error(ErrorKind::Internal, message, None));
    let result = tokio::task::spawn_blocking(work).await;
    let value = result
        .map_err(|problem| internal(problem.to_string()))?
        .map_err(Failed)?;
    serde_json::to_value(value)
        .map(Json)
        .map_err(|problem| internal(problem.to_string()))
}

/// A body that is read as this type, or else the reason why it is not one.
fn body<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, Failed> {
    let bytes = if bytes.is_empty() { b"{}" } else { bytes };
    serde_json::from_slice(bytes).map_err(|problem| {
        Failed(error(
            ErrorKind::Usage,
            format!("the request cannot be read: {problem}"),
            None,
        ))
    })
}

#[derive(Deserialize)]
struct Watch {
    #[serde(default)]
    after: u64,
}

type Shared = State<Arc<Agent>>;
type Asks = ConnectInfo<Caller>;

async fn host(State(agent): Shared) -> Answer {
    blocking(move || agent.host_info()).await
}

async fn list_vms(State(agent): Shared) -> Answer {
    blocking(move || {
        Ok(agent
            .entries()
            .iter()
            .map(|entry| agent.vm_info(entry))
            .collect::<Vec<_>>())
    })
    .await
}

fn infos(agent: &Agent) -> Vec<MigrationInfo> {
    let mut infos: Vec<_> = agent
        .migrations()
        .iter()
        .map(|tracked| tracked.info())
        .collect();
    infos.sort_by_key(|info| info.id);
    infos
}

async fn list_migrations(State(agent): Shared) -> Answer {
    blocking(move || Ok(infos(&agent))).await
}

/// What serves a verb. The only way to a route, so that none is without its row in the matrix of refusals.
fn handler(verb: ControlVerb) -> MethodRouter<Arc<Agent>> {
    match verb {
        ControlVerb::Host => get(host),
        ControlVerb::ListVms => get(list_vms),
        ControlVerb::ListMigrations => get(list_migrations),
        ControlVerb::Metrics => get(numbers),
        ControlVerb::Events => get(events),
        ControlVerb::ShowVm => get(show_vm),
        ControlVerb::ListDecisions => get(list_decisions),
        ControlVerb::ShowMigration => get(show_migration),
        ControlVerb::WatchMigration => get(watch_migration),
        ControlVerb::RunVm => post(run_vm),
        ControlVerb::AdoptVm => post(adopt_vm),
        ControlVerb::StopVm => post(stop_vm),
        ControlVerb::GivePassport => post(give_passport),
        ControlVerb::StartMigration => post(start_migration),
        ControlVerb::AbortMigration => post(abort_migration),
        ControlVerb::ResolveMigration => post(resolve_migration),
        ControlVerb::Doctor => post(doctor),
        ControlVerb::ListAdvertisements => get(list_advertisements),
        ControlVerb::MakeAdvertisement => post(make_advertisement),
        ControlVerb::AcceptAdvertisement => post(accept_advertisement),
        ControlVerb::PardonHost => post(pardon_host),
    }
}

/// The routes of a socket. What may change something is never among those of the observe socket.
fn routes(socket: Socket) -> Router<Arc<Agent>> {
    ControlVerb::ALL
        .iter()
        .filter(|verb| verb.socket() == socket || verb.socket() == Socket::Both)
        .filter(|verb| socket == Socket::Control || verb.method() == Method::Get)
        .fold(Router::new(), |router, verb| {
            router.route(verb.path(), handler(*verb))
        })
}

fn control(agent: Arc<Agent>) -> Router {
    routes(Socket::Control)
        .fallback(nowhere)
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(agent)
}

fn observe(agent: Arc<Agent>) -> Router {
    routes(Socket::Observe)
        .fallback(nowhere)
        .layer(DefaultBodyLimit::max(0))
        .with_state(agent)
}

async fn numbers(State(agent): Shared) -> impl IntoResponse {
    metrics::render(&agent)
}

async fn nowhere() -> Failed {
    Failed(error(
        ErrorKind::NotFound,
        "there is nothing at this path on this socket",
        None,
    ))
}

async fn run_vm(
    State(agent): Shared,
    ConnectInfo(caller): Asks,
    bytes: axum::body::Bytes,
) -> Answer {
    let request: RunVm = body(&bytes)?;
    blocking(move || {
        let passport = request.passport.as_ref().map(|passport| &passport.0[..]);
        agent.run_vm(&request.spec, passport, caller)
    })
    .await
}

async fn adopt_vm(
    State(agent): Shared,
    ConnectInfo(caller): Asks,
    bytes: axum::body::Bytes,
) -> Answer {
    let request: AdoptVm = body(&bytes)?;
    blocking(move || {
        let passport = request.passport.as_ref().map(|passport| &passport.0[..]);
        let qmp = Path::new(&request.qmp);
        agent.adopt_vm(&request.name, request.pid, qmp, passport, caller)
    })
    .await
}

async fn give_passport(
    State(agent): Shared,
    ConnectInfo(caller): Asks,
    UrlPath(name): UrlPath<String>,
    bytes: axum::body::Bytes,
) -> Answer {
    let request: GivePassport = body(&bytes)?;
    blocking(move || agent.give_passport(&name, &request.passport.0, caller)).await
}

async fn list_decisions(State(agent): Shared) -> Answer {
    blocking(move || agent.decisions()).await
}

async fn show_vm(State(agent): Shared, UrlPath(name): UrlPath<String>) -> Answer {
    blocking(move || agent.show_vm(&name)).await
}

async fn stop_vm(
    State(agent): Shared,
    ConnectInfo(caller): Asks,
    UrlPath(name): UrlPath<String>,
) -> Answer {
    blocking(move || agent.stop_vm(&name, caller)).await
}

async fn start_migration(
    State(agent): Shared,
    ConnectInfo(caller): Asks,
    bytes: axum::body::Bytes,
) -> Answer {
    let request: StartMigration = body(&bytes)?;
    blocking(move || agent.start_migration(&request, caller)).await
}

async fn show_migration(State(agent): Shared, UrlPath(id): UrlPath<Uuid>) -> Answer {
    blocking(move || agent.tracked(id).map(|tracked| tracked.info())).await
}

async fn watch_migration(
    State(agent): Shared,
    UrlPath(id): UrlPath<Uuid>,
    Query(watch): Query<Watch>,
) -> Answer {
    blocking(move || {
        agent
            .tracked(id)
            .map(|t| t.wait_change(watch.after, WATCH_TIMEOUT))
    })
    .await
}

async fn abort_migration(
    State(agent): Shared,
    ConnectInfo(caller): Asks,
    UrlPath(id): UrlPath<Uuid>,
) -> Answer {
    blocking(move || agent.abort_migration(id, caller)).await
}

async fn resolve_migration(
    State(agent): Shared,
    ConnectInfo(caller): Asks,
    UrlPath(id): UrlPath<Uuid>,
    bytes: axum::body::Bytes,
) -> Answer {
    let request: ResolveMigration = body(&bytes)?;
    blocking(move || agent.resolve_migration(id, &request, caller)).await
}

async fn doctor(
    State(agent): Shared,
    ConnectInfo(caller): Asks,
    bytes: axum::body::Bytes,
) -> Answer {
    let request: DoctorRequest = body(&bytes)?;
    blocking(move || agent.doctor(&request, caller)).await
}

async fn list_advertisements(State(agent): Shared) -> Answer {
    blocking(move || agent.list_advertisements()).await
}

async fn make_advertisement(
    State(agent): Shared,
    ConnectInfo(caller): Asks,
    bytes: axum::body::Bytes,
) -> Answer {
    let request: MakeAdvertisement = body(&bytes)?;
    blocking(move || agent.make_advertisement(&request, caller)).await
}

async fn accept_advertisement(
    State(agent): Shared,
    ConnectInfo(caller): Asks,
    bytes: axum::body::Bytes,
) -> Answer {
    let request: AcceptAdvertisement = body(&bytes)?;
    blocking(move || agent.accept_advertisement(&request.parcel.0, caller)).await
}

async fn pardon_host(
    State(agent): Shared,
    ConnectInfo(caller): Asks,
    bytes: axum::body::Bytes,
) -> Answer {
    let request: PardonHost = body(&bytes)?;
    blocking(move || agent.pardon_host(&request.host, caller)).await
}

/// Every migration whenever it has changed.
async fn events(
    State(agent): Shared,
) -> Sse<impl futures_core::Stream<Item = Result<Event, Infallible>>> {
    let (sender, receiver) = tokio::sync::mpsc::channel(64);
    tokio::spawn(async move {
        let mut seen = std::collections::HashMap::new();
        let mut tick = tokio::time::interval(EVENT_TICK);
        loop {
            tick.tick().await;
            for info in infos(&agent) {
                if seen.insert(info.id, info.revision) != Some(info.revision) {
                    let event = Event::default().event("migration");
                    let Ok(event) = event.json_data(&info) else {
                        continue;
                    };
                    if sender.send(Ok(event)).await.is_err() {
                        return;
                    }
                }
            }
            if sender.is_closed() {
                return;
            }
        }
    });
    Sse::new(tokio_stream::wrappers::ReceiverStream::new(receiver)).keep_alive(KeepAlive::default())
}

/// A UNIX socket that serves only some users.
struct Door {
    listener: UnixListener,
    /// Whose gates say who may enter beside root and our own user; without, everybody may.
    guarded: Option<Arc<Agent>>,
}

impl Connected<IncomingStream<'_, Door>> for Caller {
    fn connect_info(stream: IncomingStream<'_, Door>) -> Self {
        // Nobody without credentials gets through a guarded door.
        let uid = stream.io().peer_cred().map_or(u32::MAX, |peer| peer.uid());
        Self { uid }
    }
}

impl axum::serve::Listener for Door {
    type Io = UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    let own = rustix::process::geteuid().as_raw();
                    let uid = stream.peer_cred().map(|peer| peer.uid());
                    match uid {
                        Ok(uid) if self.admits(uid, own) => return (stream, address),
                        Ok(uid) => {
                            tracing::warn!(uid, "a user who may not control was turned away");
                        }
                        Err(problem) => {
                            tracing::warn!(%problem, "a user without credentials was turned away");
                        }
                    }
                }
                Err(problem) => {
                    tracing::warn!(%problem, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

impl Door {
    fn admits(&self, uid: u32, own: u32) -> bool {
        let Some(agent) = &self.guarded else {
            return true;
        };
        uid == 0 || uid == own || agent.gate.may_enter(uid)
    }
}

fn open(path: &Path, mode: u32, guarded: Option<Arc<Agent>>) -> io::Result<Door> {
    match std::fs::remove_file(path) {
        Err(problem) if problem.kind() != io::ErrorKind::NotFound => return Err(problem),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(Door { listener, guarded })
}

/// Path of the control socket.
pub fn control_path(runtime_dir: &Path) -> PathBuf {
    runtime_dir.join("control.sock")
}

/// Path of the observe socket.
pub fn observe_path(runtime_dir: &Path) -> PathBuf {
    runtime_dir.join("observe.sock")
}

/// Serves both sockets until the future `stop` ends.
///
/// # Errors
///
/// A socket can't be made.
pub async fn serve(agent: &Arc<Agent>, stop: impl Future<Output = ()>) -> io::Result<()> {
    let dir = &agent.config.runtime_dir;
    // Where local users are operators, it is the door that looks at them.
    let mode = if agent.gate.has_local_operators() {
        0o666
    } else {
        0o660
    };
    let control_door = open(&control_path(dir), mode, Some(Arc::clone(agent)))?;
    let observe_door = open(&observe_path(dir), 0o666, None)?;
    let asks = control(Arc::clone(agent)).into_make_service_with_connect_info::<Caller>();
    let control = axum::serve(control_door, asks).into_future();
    let observe = axum::serve(observe_door, observe(Arc::clone(agent))).into_future();
    let (control, observe) = (tokio::spawn(control), tokio::spawn(observe));
    tracing::info!(control = %control_path(dir).display(), "ready");
    stop.await;
    control.abort();
    observe.abort();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_route_is_made_but_from_a_verb() {
        let word = [".rou", "te("].concat();
        assert_eq!(include_str!("http.rs").matches(&word).count(), 1);
    }

    #[test]
    fn the_routes_of_each_socket_fit_beside_each_other() {
        // Two of the same would panic.
        for socket in [Socket::Control, Socket::Observe] {
            assert!(routes(socket).has_routes());
        }
    }
}
