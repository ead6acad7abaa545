//! An open loop that does not stop: a request is due every so often, whoever is free sends it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::world::HOST;

/// Requests that are due and wait for a free connection. At more the clock waits, and the wait counts as latency.
const WAITING_MAX: usize = 4096;
/// Largest answer that is read.
const ANSWER_MAX: usize = 64 * 1024;
/// Requests of which one should cross, where half of them do.
const CARRIER_TRIES: usize = 64;
const CARRIER_TIME_MAX: Duration = Duration::from_secs(5);

/// One request.
#[derive(Debug, Clone)]
pub struct Sample {
    pub due: Instant,
    pub done: Instant,
    /// Who answered with 200; `None` when it failed or was late.
    pub app: Option<String>,
}

impl Sample {
    pub fn is_ok(&self) -> bool {
        self.app.is_some()
    }

    pub fn latency(&self) -> Duration {
        self.done.saturating_duration_since(self.due)
    }
}

/// Runs until it is dropped.
pub struct Load {
    samples: Arc<Mutex<Vec<Sample>>>,
    _tasks: JoinSet<()>,
}

impl Load {
    pub fn start(proxy: SocketAddr, rate: u32, connections: usize, deadline: Duration) -> Self {
        let samples = Arc::new(Mutex::new(Vec::new()));
        let (due, waiting) = mpsc::channel(WAITING_MAX);
        let waiting = Arc::new(tokio::sync::Mutex::new(waiting));
        let mut tasks = JoinSet::new();
        tasks.spawn(clock(due, Duration::from_secs(1) / rate));
        for _ in 0..connections {
            tasks.spawn(worker(proxy, waiting.clone(), deadline, samples.clone()));
        }
        Self { samples, _tasks: tasks }
    }

    /// The requests that were done after `start`, in the order in which they were done.
    pub fn since(&self, start: Instant) -> Vec<Sample> {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let at = samples.partition_point(|sample| sample.done < start);
        samples[at..].to_vec()
    }
}

async fn clock(due: mpsc::Sender<Instant>, interval: Duration) {
    let mut next = Instant::now();
    loop {
        next += interval;
        tokio::time::sleep_until(next.into()).await;
        if due.send(next).await.is_err() {
            return;
        }
    }
}

async fn worker(
    proxy: SocketAddr,
    waiting: Arc<tokio::sync::Mutex<mpsc::Receiver<Instant>>>,
    deadline: Duration,
    samples: Arc<Mutex<Vec<Sample>>>,
) {
    let mut kept = None;
    loop {
        let next = waiting.lock().await.recv().await;
        let Some(due) = next else { return };
        let answer = tokio::time::timeout_at((due + deadline).into(), ask(proxy, kept.take())).await;
        let app = match answer {
            Ok(Ok((connection, app))) => {
                kept = Some(connection);
                app
            }
            Ok(Err(_)) | Err(_) => None,
        };
        let mut samples = samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.push(Sample { due, done: Instant::now(), app });
    }
}

/// One request on a connection that was kept, or a new one; who answered, if it was with 200.
async fn ask(proxy: SocketAddr, kept: Option<TcpStream>) -> anyhow::Result<(TcpStream, Option<String>)> {
    let mut stream = match kept {
        Some(stream) => stream,
        None => TcpStream::connect(proxy).await?,
    };
    let answer = exchange(&mut stream, "").await?;
    Ok((stream, answer.app))
}

/// Which gateway of the caller's cluster carries its requests, as the sidecar explains.
pub async fn carrier(proxy: SocketAddr) -> anyhow::Result<String> {
    for _ in 0..CARRIER_TRIES {
        let mut stream = TcpStream::connect(proxy).await?;
        let answer = tokio::time::timeout(CARRIER_TIME_MAX, exchange(&mut stream, "tombolo-explain: 1\r\n")).await??;
        // As in `tombolo-path: east/gw-1 > west/gw`.
        let path = answer.head.lines().find_map(|line| line.strip_prefix("tombolo-path: "));
        let gateway = path.and_then(|path| path.split_once(" > ")?.0.split_once('/').map(|(_, gateway)| gateway));
        if let Some(gateway) = gateway {
            return Ok(gateway.to_owned());
        }
    }
    bail!("none of {CARRIER_TRIES} requests crossed to the other cluster")
}

#[derive(Debug, PartialEq, Eq)]
struct Answer {
    head: String,
    /// Who answered, if it was with 200.
    app: Option<String>,
}

async fn exchange(stream: &mut TcpStream, headers: &str) -> anyhow::Result<Answer> {
    let request = format!("GET http://{HOST}/ HTTP/1.1\r\nhost: {HOST}\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut octets = Vec::with_capacity(1024);
    loop {
        if let Some(answer) = parse(&octets)? {
            return Ok(answer);
        }
        if octets.len() > ANSWER_MAX || stream.read_buf(&mut octets).await? == 0 {
            bail!("the answer has no end");
        }
    }
}

/// `None` while more is to come. The applications here say how long their answers are.
fn parse(octets: &[u8]) -> anyhow::Result<Option<Answer>> {
    let Some(end) = octets.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&octets[..end])?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let body = &octets[end + 4..];
    if body.len() < length.context("an answer without a length")? {
        return Ok(None);
    }
    let greeting = head.starts_with("HTTP/1.1 200 ").then(|| serde_json::from_slice::<serde_json::Value>(body));
    let greeting = greeting.transpose().context("the application's greeting")?;
    let app = greeting.and_then(|greeting| greeting["app"].as_str().map(str::to_owned));
    Ok(Some(Answer { head: head.to_owned(), app }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_answer_is_read_to_its_end() {
        let whole = b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{\"app\":\"east\"}";
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length]).unwrap(), None, "{length}");
        }
        assert_eq!(parse(whole).unwrap().unwrap().app, Some("east".into()));
        assert_eq!(parse(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n").unwrap().unwrap().app, None);
        assert!(parse(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }
}
