//! A client of an agent's sockets: what the command line does, for the tests that must look often and quickly.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Largest answer read.
const LARGEST: u64 = 16 << 20;

/// A status and a body.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Body.
    pub body: Vec<u8>,
}

/// Asks over a UNIX socket.
///
/// # Errors
///
/// If nobody answers, or the answer is not HTTP.
pub fn request(socket: &Path, method: &str, path: &str, body: &[u8]) -> Result<Answer> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("no agent answers at {}", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let length = body.len();
    let mut message = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )
    .into_bytes();
    message.extend(body);
    match stream.write_all(&message) {
        // Whoever refuses a request need not read it: the answer is there all the same.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => return Err(error.into()),
        _ => {}
    }
    let mut bytes = Vec::new();
    stream.take(LARGEST).read_to_end(&mut bytes)?;
    parse(&bytes).with_context(|| format!("{method} {path}"))
}

fn parse(bytes: &[u8]) -> Result<Answer> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
    let end = end.context("the answer has no end of its head")?;
    let head = String::from_utf8_lossy(&bytes[..end]);
    let mut words = head.split_ascii_whitespace();
    if !words
        .next()
        .is_some_and(|version| version.starts_with("HTTP/1."))
    {
        bail!("the answer is not HTTP");
    }
    let status = words
        .next()
        .and_then(|word| word.parse().ok())
        .context("no status")?;
    let body = bytes[end + 4..].to_vec();
    Ok(Answer { status, body })
}

/// Gets a resource.
///
/// # Errors
///
/// If nobody answers, or not with what is expected.
pub fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T> {
    decode(path, &request(socket, "GET", path, &[])?)
}

/// Posts to a resource.
///
/// # Errors
///
/// If nobody answers, or not with what is expected.
pub fn post<T: DeserializeOwned>(socket: &Path, path: &str, body: &impl Serialize) -> Result<T> {
    decode(
        path,
        &request(socket, "POST", path, &serde_json::to_vec(body)?)?,
    )
}

fn decode<T: DeserializeOwned>(path: &str, answer: &Answer) -> Result<T> {
    let text = String::from_utf8_lossy(&answer.body);
    if answer.status >= 400 {
        bail!("{path}: status {}: {text}", answer.status);
    }
    serde_json::from_slice(&answer.body).with_context(|| format!("{path}: unexpected {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_taken_apart() {
        let answer = parse(b"HTTP/1.1 404 Not Found\r\nA: b\r\n\r\n{}").unwrap();
        assert_eq!((answer.status, answer.body), (404, b"{}".to_vec()));
        assert!(parse(b"nonsense").is_err());
    }
}
