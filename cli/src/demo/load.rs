//! The demo's load: requests at a fixed rate whatever the answers do (open loop), through a sidecar's
//! forward proxy. A request without a good answer within its deadline has failed.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper::{HeaderMap, Request};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::app::Greeting;

pub const URL: &str = "http://web.shop.svc.clusterset.local/";
const HOST: &str = "web.shop.svc.clusterset.local";
const RATE_PER_S: u32 = 200;
const CONNECTIONS: u32 = 20;
pub const DEADLINE: Duration = Duration::from_secs(2);

/// One keep-alive connection to a sidecar.
pub struct Caller {
    proxy: SocketAddr,
    connection: Option<SendRequest<Empty<Bytes>>>,
}

impl Caller {
    pub fn new(proxy: SocketAddr) -> Self {
        Self { proxy, connection: None }
    }

    /// One request; asks the sidecar to explain which way it took.
    pub async fn call(&mut self) -> anyhow::Result<(HeaderMap, Greeting)> {
        match tokio::time::timeout(DEADLINE, self.call_without_deadline()).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                self.connection = None;
                Err(error)
            }
            Err(_) => {
                self.connection = None;
                bail!("no answer within {DEADLINE:?}")
            }
        }
    }

    async fn call_without_deadline(&mut self) -> anyhow::Result<(HeaderMap, Greeting)> {
        let connection = match self.connection.take().filter(|connection| !connection.is_closed()) {
            Some(connection) => self.connection.insert(connection),
            None => self.connection.insert(connect(self.proxy).await?),
        };
        connection.ready().await?;
        let request = Request::get(URL).header("host", HOST).header("tombolo-explain", "1").body(Empty::new())?;
        let response = connection.send_request(request).await?;
        let (head, body) = response.into_parts();
        let body = body.collect().await?.to_bytes();
        if !head.status.is_success() {
            bail!("{}: {}", head.status, String::from_utf8_lossy(&body).trim());
        }
        let greeting = serde_json::from_slice(&body).context("the answer is not the application's")?;
        Ok((head.headers, greeting))
    }
}

async fn connect(proxy: SocketAddr) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
    let stream = TcpStream::connect(proxy).await.with_context(|| format!("connecting to the sidecar at {proxy}"))?;
    stream.set_nodelay(true)?;
    let (connection, driver) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(driver);
    Ok(connection)
}

/// What became of one request.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub began: Instant,
    pub took: Duration,
    /// The application that answered, or why none did.
    pub answer: Result<String, String>,
}

/// A load that runs until it is stopped.
pub struct Load {
    stop: watch::Sender<bool>,
    outcomes: mpsc::Receiver<Outcome>,
    workers: Vec<JoinHandle<()>>,
}

impl Load {
    pub fn start(proxy: SocketAddr) -> Self {
        let (stop, stopped) = watch::channel(false);
        // A minute of outcomes: the demo never runs a load for longer.
        let (sender, outcomes) = mpsc::channel(usize::try_from(RATE_PER_S * 60).expect("fits"));
        let period = Duration::from_secs(1) * CONNECTIONS / RATE_PER_S;
        let began = Instant::now();
        let workers = (0..CONNECTIONS)
            .map(|index| {
                let first = began + period * index / CONNECTIONS;
                tokio::spawn(worker(proxy, first, period, sender.clone(), stopped.clone()))
            })
            .collect();
        Self { stop, outcomes, workers }
    }

    /// What has happened since the last look.
    pub fn drain(&mut self) -> Vec<Outcome> {
        std::iter::from_fn(|| self.outcomes.try_recv().ok()).collect()
    }

    /// Stops asking, waits for the last answers, and gives what is left.
    pub async fn stop(mut self) -> Vec<Outcome> {
        let _ = self.stop.send(true);
        for worker in self.workers.drain(..) {
            let _ = worker.await;
        }
        self.drain()
    }
}

async fn worker(
    proxy: SocketAddr,
    first: Instant,
    period: Duration,
    outcomes: mpsc::Sender<Outcome>,
    mut stopped: watch::Receiver<bool>,
) {
    let mut caller = Caller::new(proxy);
    let mut due = first;
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(due.into()) => {}
            _ = stopped.changed() => return,
        }
        let answer = caller.call().await.map(|(_, greeting)| greeting.app).map_err(|error| format!("{error:#}"));
        // Measured from when the request was due: a late start counts.
        let outcome = Outcome { began: due, took: due.elapsed(), answer };
        let late = outcome.took > DEADLINE && outcome.answer.is_ok();
        let outcome = if late { Outcome { answer: Err("late".to_owned()), ..outcome } } else { outcome };
        if outcomes.try_send(outcome).is_err() {
            return;
        }
        due += period;
    }
}

/// The value below which the given share of the requests stayed.
pub fn quantile(outcomes: &[Outcome], share: f64) -> Duration {
    let mut times: Vec<Duration> = outcomes.iter().map(|outcome| outcome.took).collect();
    times.sort_unstable();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let index = ((times.len() as f64 - 1.0) * share).round().max(0.0) as usize;
    times.get(index).copied().unwrap_or_default()
}
