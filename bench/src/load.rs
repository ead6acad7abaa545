//! Load and what it shows. Closed loop: each connection asks again when it is answered. Open loop: requests
//! begin when they are due whatever happened to the ones before, and waiting counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use tokio::task::JoinSet;

use tombolo_kind_tests::client::{Connection, Target};

/// What a closed loop measured, without its warm-up.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    pub requests: u64,
    pub failed: u64,
    pub per_second: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
}

/// One value out of sorted ones; the nearest rank.
pub fn percentile(sorted: &[u32], share: f64) -> f64 {
    if sorted.is_empty() {
        return f64::NAN;
    }
    let rank = (share * sorted.len() as f64).ceil() as usize;
    f64::from(sorted[rank.clamp(1, sorted.len()) - 1])
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

/// Where a closed loop is: workers look, the measuring task writes.
#[derive(Default)]
struct Stage {
    measuring: AtomicBool,
    over: AtomicBool,
    failed: AtomicU64,
}

/// Runs `connections` workers, lets them warm up, then measures for `duration`. `at_edges` runs when the
/// measured time begins and when it ends, to read what the processes used.
pub async fn closed<T>(
    target: &Target,
    connections: usize,
    mode: Mode,
    warm_up: Duration,
    duration: Duration,
    mut at_edges: impl FnMut() -> T,
) -> anyhow::Result<(Figures, T, T)> {
    let stage = Arc::new(Stage::default());
    let mut workers = JoinSet::new();
    for _ in 0..connections {
        workers.spawn(work(target.clone(), mode, stage.clone()));
    }
    tokio::time::sleep(warm_up).await;
    let before = at_edges();
    let began = Instant::now();
    stage.measuring.store(true, Relaxed);
    tokio::time::sleep(duration).await;
    stage.measuring.store(false, Relaxed);
    let elapsed = began.elapsed();
    let after = at_edges();
    stage.over.store(true, Relaxed);
    let mut latencies: Vec<u32> = Vec::new();
    while let Some(worker) = workers.join_next().await {
        latencies.extend(worker.context("a worker panicked")?);
    }
    latencies.sort_unstable();
    let failed = stage.failed.load(Relaxed);
    ensure!(!latencies.is_empty(), "no request to {} succeeded; {failed} failed", target.address);
    let figures = Figures {
        requests: latencies.len() as u64,
        failed,
        per_second: latencies.len() as f64 / elapsed.as_secs_f64(),
        p50_ms: percentile(&latencies, 0.5) / 1e3,
        p99_ms: percentile(&latencies, 0.99) / 1e3,
    };
    Ok((figures, before, after))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Connections stay open.
    KeepAlive,
    /// Each request has a connection of its own.
    NewConnections,
}

async fn work(target: Target, mode: Mode, stage: Arc<Stage>) -> Vec<u32> {
    let request = target.request("/");
    let mut latencies = Vec::new();
    let mut connection = None;
    while !stage.over.load(Relaxed) {
        let began = Instant::now();
        let outcome = once(&target, &request, &mut connection, mode).await;
        match outcome {
            Ok(()) if stage.measuring.load(Relaxed) => latencies.push(micros(began.elapsed())),
            Ok(()) => {}
            Err(_) => {
                stage.failed.fetch_add(u64::from(stage.measuring.load(Relaxed)), Relaxed);
                // A system that refuses everything must not spin the generator.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
    latencies
}

async fn once(target: &Target, request: &[u8], connection: &mut Option<Connection>, mode: Mode) -> anyhow::Result<()> {
    let mut current = match connection.take() {
        Some(connection) => connection,
        None => Connection::open(target.address).await?,
    };
    let answer = current.exchange(request).await?;
    ensure!(answer.status == 200, "status {}", answer.status);
    if answer.keep_alive && mode == Mode::KeepAlive {
        *connection = Some(current);
    }
    Ok(())
}

/// Gigabits a second of one download of `bytes`.
pub async fn bulk(target: &Target, bytes: u64) -> anyhow::Result<f64> {
    let mut connection = Connection::open(target.address).await?;
    // The connection's windows open before the clock runs.
    connection.exchange(&target.request("/bulk/20000000")).await?;
    let began = Instant::now();
    let answer = connection.exchange(&target.request(&format!("/bulk/{bytes}"))).await?;
    ensure!(answer.status == 200 && answer.body_length == bytes, "{answer:?}");
    Ok(bytes as f64 * 8.0 / began.elapsed().as_secs_f64() / 1e9)
}

/// `rate` requests a second over one connection, begun when due. Milliseconds: p50, p99.
///
/// A thread of its own with blocking calls: tokio's timer counts whole milliseconds, which is more than
/// what is measured here.
pub async fn paced(target: Target, rate: u32, duration: Duration) -> anyhow::Result<(f64, f64)> {
    let mut latencies = tokio::task::spawn_blocking(move || pace(&target, rate, duration)).await??;
    latencies.sort_unstable();
    Ok((percentile(&latencies, 0.5) / 1e3, percentile(&latencies, 0.99) / 1e3))
}

fn pace(target: &Target, rate: u32, duration: Duration) -> anyhow::Result<Vec<u32>> {
    use std::io::{Read, Write};
    nix::sys::prctl::set_timerslack(1)?;
    let mut stream = std::net::TcpStream::connect(target.address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let request = target.request("/");
    let mut buffer = vec![0; 64 * 1024];
    let mut exchange = || -> anyhow::Result<()> {
        stream.write_all(&request)?;
        let mut filled = 0;
        loop {
            let read = stream.read(&mut buffer[filled..])?;
            ensure!(read > 0, "the connection was closed");
            filled += read;
            let head_end = buffer[..filled].windows(4).position(|window| window == b"\r\n\r\n");
            if let Some(head_end) = head_end {
                let head = std::str::from_utf8(&buffer[..head_end])?;
                let length = head.split_once("content-length: ").map(|(_, rest)| rest.split("\r\n").next());
                let length: usize = length.flatten().context("content-length")?.parse()?;
                if filled >= head_end + 4 + length {
                    return Ok(());
                }
            }
        }
    };
    for _ in 0..rate {
        exchange()?;
    }
    let interval = Duration::from_secs(1) / rate;
    let began = Instant::now();
    let mut latencies = Vec::new();
    for n in 0.. {
        let due = interval * n;
        if due >= duration {
            break;
        }
        if let Some(wait) = due.checked_sub(began.elapsed()) {
            std::thread::sleep(wait);
        }
        exchange()?;
        latencies.push(micros(began.elapsed() - due));
    }
    Ok(latencies)
}
