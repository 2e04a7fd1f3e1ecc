//! The agent's control socket: HTTP/1.1 over a UNIX socket, one connection for each request.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use palanquin_api::control::{ApiError, ErrorKind};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::failure::Failure;

/// Longest answer.
const ANSWER_MAX: usize = 8 << 20;
/// Longest wait for an answer; starting a VM or aborting a migration may take a while.
const TIMEOUT: Duration = Duration::from_secs(90);

/// Speaks to one agent.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    socket: PathBuf,
}

/// How a request failed, by what is known of its effect.
#[derive(Debug)]
pub(crate) enum RequestError {
    /// There was nobody to ask: nothing happened.
    Unreachable(io::Error),
    /// The agent was asked and did not answer: it may have done what was asked, or may yet.
    Unanswered(io::Error),
    /// The agent answered something that is not understood: it may have done what was asked.
    Odd(Failure),
    /// The agent answered with an error.
    Refused(Failure),
}

impl RequestError {
    /// As an error after which the state of a migration is not known, where that is so.
    pub(crate) fn leaves_in_doubt(self, message: &str, hint: &str) -> Failure {
        let in_doubt = |cause: &dyn std::fmt::Display| {
            Failure::new(ErrorKind::InDoubt, message)
                .cause(cause)
                .hint(hint)
        };
        match self {
            Self::Unanswered(problem) => in_doubt(&problem),
            Self::Odd(failure) => failure
                .0
                .causes
                .iter()
                .fold(in_doubt(&failure.0.message), Failure::cause),
            other => other.into(),
        }
    }
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Refused(failure) | RequestError::Odd(failure) => failure,
            RequestError::Unreachable(problem) => {
                let hint = match problem.kind() {
                    io::ErrorKind::PermissionDenied => {
                        "only root and the agent's user may control it: try with sudo"
                    }
                    _ => {
                        "is palanquind running? `systemctl status palanquind`, or pass --socket PATH"
                    }
                };
                Self::new(ErrorKind::Internal, "the agent cannot be reached")
                    .cause(problem)
                    .hint(hint)
            }
            RequestError::Unanswered(problem) => {
                Self::new(ErrorKind::Internal, "the agent did not answer")
                    .cause(problem)
                    .hint("it may have done what was asked: `palanquin vm ls` and `palanquin migration ls` tell")
            }
        }
    }
}

impl Client {
    /// With the path of the control socket.
    pub(crate) fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// `GET`
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, RequestError> {
        self.request(Method::GET, path, Vec::new()).await
    }

    /// `POST`
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &(impl Serialize + Sync),
    ) -> Result<T, RequestError> {
        let body = serde_json::to_vec(body).map_err(|error| odd(&error))?;
        self.request(Method::POST, path, body).await
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, RequestError> {
        let exchange = self.exchange(method, path, body);
        let (status, bytes) = tokio::time::timeout(TIMEOUT, exchange)
            .await
            .map_err(|_| RequestError::Unanswered(io::ErrorKind::TimedOut.into()))??;
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|error| odd(&error));
        }
        match serde_json::from_slice::<ApiError>(&bytes) {
            Ok(error) => Err(RequestError::Refused(error.into())),
            Err(error) => Err(odd(&format!("status {status}, and {error}"))),
        }
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<(StatusCode, Bytes), RequestError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| {
            let message = format!("{}: {error}", self.socket.display());
            RequestError::Unreachable(io::Error::new(error.kind(), message))
        })?;
        let lost = |error: hyper::Error| RequestError::Unanswered(io::Error::other(error));
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(lost)?;
        let driver = AbortOnDrop(tokio::spawn(connection));
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "palanquin")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| odd(&error))?;
        let response = sender.send_request(request).await.map_err(lost)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX)
            .collect()
            .await
            .map_err(|error| RequestError::Unanswered(io::Error::other(error)))?;
        drop(driver);
        Ok((status, body.to_bytes()))
    }
}

/// A connection that is closed when nobody waits for it any more.
struct AbortOnDrop(tokio::task::JoinHandle<hyper::Result<()>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn odd(problem: &dyn std::fmt::Display) -> RequestError {
    let failure = Failure::new(ErrorKind::Internal, "the agent's answer is not understood")
        .cause(problem)
        .hint("do `palanquin --version` and `palanquind --version` agree?");
    RequestError::Odd(failure)
}
