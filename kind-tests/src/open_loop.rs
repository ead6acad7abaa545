//! An open loop that does not stop: a request is due every so often, whoever is free sends it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::client::{Answer, Connection, Target};

/// Requests that are due and wait for a free connection. More would mean that nothing has answered for
/// several deadlines; the clock then waits, and the wait counts as latency.
const WAITING_MAX: usize = 4096;

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

/// Runs until it is stopped or dropped.
pub struct Load {
    samples: Arc<Mutex<Vec<Sample>>>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Load {
    pub fn start(target: Target, rate: u32, connections: usize, deadline: Duration) -> Self {
        let samples = Arc::new(Mutex::new(Vec::new()));
        let (stop, stopped) = watch::channel(false);
        let (due, waiting) = mpsc::channel(WAITING_MAX);
        let waiting = Arc::new(tokio::sync::Mutex::new(waiting));
        let mut tasks = JoinSet::new();
        tasks.spawn(clock(due, Duration::from_secs(1) / rate, stopped));
        for _ in 0..connections {
            tasks.spawn(worker(target.clone(), waiting.clone(), deadline, samples.clone()));
        }
        Self { samples, stop, tasks }
    }

    /// The requests that were done after `start`, in the order in which they were done.
    pub fn since(&self, start: Instant) -> Vec<Sample> {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let at = samples.partition_point(|sample| sample.done < start);
        samples[at..].to_vec()
    }

    /// Ends the load when the requests under way are done, and gives all of them.
    pub async fn stop(self) -> Vec<Sample> {
        let _ = self.stop.send(true);
        self.tasks.join_all().await;
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut samples)
    }
}

async fn clock(due: mpsc::Sender<Instant>, interval: Duration, stopped: watch::Receiver<bool>) {
    let mut next = Instant::now();
    while !*stopped.borrow() {
        next += interval;
        tokio::time::sleep_until(next.into()).await;
        if due.send(next).await.is_err() {
            return;
        }
    }
}

async fn worker(
    target: Target,
    waiting: Arc<tokio::sync::Mutex<mpsc::Receiver<Instant>>>,
    deadline: Duration,
    samples: Arc<Mutex<Vec<Sample>>>,
) {
    let request = target.request("/");
    let mut connection = None;
    loop {
        let next = waiting.lock().await.recv().await;
        let Some(due) = next else { return };
        let outcome = tokio::time::timeout_at((due + deadline).into(), once(&target, &request, connection.take()));
        let app = match outcome.await {
            Ok(Ok((kept, answer))) => {
                connection = answer.keep_alive.then_some(kept);
                answer.app.filter(|_| answer.status == 200)
            }
            Ok(Err(_)) | Err(_) => None,
        };
        let mut samples = samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.push(Sample { due, done: Instant::now(), app });
    }
}

async fn once(target: &Target, request: &[u8], kept: Option<Connection>) -> anyhow::Result<(Connection, Answer)> {
    let mut connection = match kept {
        Some(connection) => connection,
        None => Connection::open(target.address).await?,
    };
    let answer = connection.exchange(request).await?;
    Ok((connection, answer))
}
