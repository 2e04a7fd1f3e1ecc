//! The agent's control socket: HTTP/1.1 over a UNIX socket, one connection for each request.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
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

/// Whether the agent answered at all.
#[derive(Debug)]
pub(crate) enum RequestError {
    /// It did not.
    Unreachable(io::Error),
    /// It did, with an error or with something else than expected.
    Answered(Failure),
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Answered(failure) => failure,
            RequestError::Unreachable(problem) => {
                let hint = match problem.kind() {
                    io::ErrorKind::PermissionDenied => {
                        "only root and the agent's user may control it: try with sudo"
                    }
                    _ => {
                        "is palanquind running? `systemctl status palanquind`, or pass --socket PATH"
                    }
                };
                Self::new(ErrorKind::Internal, "the agent does not answer")
                    .cause(problem)
                    .hint(hint)
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
        let (success, bytes) = tokio::time::timeout(TIMEOUT, exchange)
            .await
            .map_err(|_| RequestError::Unreachable(io::ErrorKind::TimedOut.into()))?
            .map_err(RequestError::Unreachable)?;
        if success {
            return serde_json::from_slice(&bytes).map_err(|error| odd(&error));
        }
        let error: ApiError = serde_json::from_slice(&bytes).map_err(|error| odd(&error))?;
        Err(RequestError::Answered(error.into()))
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> io::Result<(bool, Bytes)> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", self.socket.display()))
        })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        let driver = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "palanquin")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(io::Error::other)?;
        let response = sender
            .send_request(request)
            .await
            .map_err(io::Error::other)?;
        let success = response.status().is_success();
        let body = Limited::new(response.into_body(), ANSWER_MAX)
            .collect()
            .await;
        driver.abort();
        Ok((success, body.map_err(io::Error::other)?.to_bytes()))
    }
}

fn odd(error: &serde_json::Error) -> RequestError {
    let failure = Failure::new(ErrorKind::Internal, "the agent's answer is not understood")
        .cause(error)
        .hint("do `palanquin --version` and `palanquind --version` agree?");
    RequestError::Answered(failure)
}
