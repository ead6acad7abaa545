//! What every tombolo process needs: configuration, logs, metrics, traces, the read-only admin port,
//! readiness and drain.

pub mod admin;
pub mod config;
pub mod drain;
pub mod federation;
pub mod logging;
pub mod metrics;
pub mod process;
pub mod readiness;
pub mod telemetry;
pub mod workers;

use std::future::Future;

/// Runs `future` to its end on `workers` threads: 1 means the thread that calls, which is the faster
/// choice as long as one processor is enough, because nothing crosses threads then.
pub fn block_on<F: Future>(workers: usize, future: F) -> std::io::Result<F::Output> {
    let mut builder = match workers {
        0 | 1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    if workers > 1 {
        builder.worker_threads(workers);
    }
    Ok(builder.enable_all().build()?.block_on(future))
}
