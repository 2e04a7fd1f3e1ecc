//! What the guest serves: `GET /status` at port 80, an echo at port 7000.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

use crate::Status;

pub(crate) fn start(status: &Arc<Status>) {
    let began = Instant::now();
    let shared = Arc::clone(status);
    serve(80, move |stream| answer(stream, &shared, began));
    serve(7000, |mut stream| {
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..count]).is_err() {
                return;
            }
        }
    });
}

fn serve(port: u16, handler: impl Fn(TcpStream) + Clone + Send + 'static) {
    let listener = match TcpListener::bind(("0.0.0.0", port)) {
        Ok(listener) => listener,
        Err(error) => return println!("port {port}: {error}"),
    };
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = stream.set_nodelay(true);
            let handler = handler.clone();
            thread::spawn(move || handler(stream));
        }
    });
}

fn answer(mut stream: TcpStream, status: &Status, began: Instant) {
    let mut request = [0; 1024];
    let _ = stream.read(&mut request);
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let body = format!(
        "{{\"uptime_s\":{},\"boot_id\":\"{:016x}\",\"beats\":{},\"sweeps\":{},\"verified_pages\":{},\"corrupt_pages\":{}}}\n",
        began.elapsed().as_secs(),
        status.boot_id,
        load(&status.beats),
        load(&status.sweeps),
        load(&status.verified),
        load(&status.corrupt),
    );
    let _ = write!(
        stream,
        "HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
}
