//! A JSON line for each request that leaves, in a file of its own. Off unless configured.
//!
//! Requests never wait for the disk: a thread writes, what finds its queue full is left out and counted. Two files of
//! the configured size are the most that there is.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use http::{Request, header};
use serde::Serialize;
use tombolo_core::refusal::Refusal;
use tombolo_runtime::metrics::Metrics;
use tombolo_runtime::metrics::prometheus_client::metrics::counter::Counter;

use crate::config::AccessLogConfig;

/// Lines that wait to be written.
const QUEUE_MAX: usize = 4_096;
/// Characters of what a caller wrote, in one field.
const TEXT_MAX: usize = 512;

/// One request. Without its query and its headers, which may hold secrets.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    pub time: String,
    pub caller: Option<SocketAddr>,
    pub method: String,
    pub authority: String,
    pub path: String,
    pub service: Option<String>,
    pub port: Option<u16>,
    /// The route's resource and its rule.
    pub route: Option<String>,
    /// The traffic policy's resource.
    pub policy: Option<String>,
    /// `namespace/name:port` of whose endpoints one was picked.
    pub backend: Option<String>,
    pub cluster: Option<String>,
    pub endpoint: Option<String>,
    /// Why this endpoint.
    pub reason: Option<String>,
    pub tries: u32,
    pub status: u16,
    pub refusal: Option<Refusal>,
    pub detail: Option<String>,
    /// How the last pick came about, and `retried`, `spilled`, `redirect`, `fault`.
    pub flags: Vec<&'static str>,
    /// Until the head of the answer.
    pub head_ms: f64,
    pub trace_id: Option<String>,
}

impl Line {
    pub fn begin<B>(request: &Request<B>, caller: SocketAddr) -> Self {
        let short = |text: &str| text.chars().take(TEXT_MAX).collect::<String>();
        let host = || request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
        let authority = request.uri().authority().map_or_else(host, |authority| Some(authority.as_str()));
        Self {
            time: jiff::Timestamp::now().to_string(),
            caller: Some(caller),
            method: short(request.method().as_str()),
            authority: short(authority.unwrap_or_default()),
            path: short(request.uri().path()),
            ..Self::default()
        }
    }
}

/// Takes lines; the writer ends with it.
pub struct AccessLog {
    lines: SyncSender<Box<Line>>,
    left_out: Counter,
}

impl AccessLog {
    /// `None`, with a word in the log, where the file can't be written.
    pub fn start(config: &AccessLogConfig, metrics: &Metrics) -> Option<Self> {
        let left_out = metrics.counter("tombolo_access_log_left_out", "Lines of the access log that were not written");
        let written = OpenedFile::open(config.file.clone(), config.max_bytes);
        let file = written
            .inspect_err(|error| tracing::error!(file = %config.file.display(), %error, "accessLog.file can't be written: there is no access log"))
            .ok()?;
        let (lines, queue) = sync_channel(QUEUE_MAX);
        let failed = left_out.clone();
        let writer = std::thread::Builder::new().name("access-log".into());
        writer.spawn(move || write(&queue, file, &failed)).ok()?;
        Some(Self { lines, left_out })
    }

    pub fn write(&self, line: Box<Line>) {
        if self.lines.try_send(line).is_err() {
            self.left_out.inc();
        }
    }
}

fn write(queue: &Receiver<Box<Line>>, mut file: OpenedFile, failed: &Counter) {
    let mut said = false;
    while let Ok(first) = queue.recv() {
        let mut next = Ok(first);
        while let Ok(line) = next {
            match file.write(&line) {
                Ok(()) => said = false,
                Err(error) => {
                    failed.inc();
                    if !std::mem::replace(&mut said, true) {
                        tracing::error!(file = %file.path.display(), %error, "the access log can't be written");
                    }
                }
            }
            next = queue.try_recv();
        }
        // Nothing more waits. What can't be written shows with the next line.
        let _ = file.out.flush();
    }
}

struct OpenedFile {
    path: PathBuf,
    out: BufWriter<File>,
    octets: u64,
    octets_max: u64,
}

impl OpenedFile {
    fn open(path: PathBuf, octets_max: u64) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        Ok(Self { octets: file.metadata()?.len(), out: BufWriter::new(file), path, octets_max })
    }

    fn write(&mut self, line: &Line) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        if self.octets > 0 && self.octets + text.len() as u64 > self.octets_max {
            self.out.flush()?;
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            std::fs::rename(&self.path, older)?;
            *self = Self::open(self.path.clone(), self.octets_max)?;
        }
        self.out.write_all(&text)?;
        self.octets += text.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn two_files_are_the_most_that_there_is() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("access.log");
        let mut log = OpenedFile::open(file.clone(), 1_000).unwrap();
        let line = |n: u32| Line { path: format!("/{n}"), ..Line::default() };
        let one = serde_json::to_vec(&line(10)).unwrap().len() + 1;
        for n in 10..30 {
            log.write(&line(n)).unwrap();
        }
        log.out.flush().unwrap();
        let read = |file: &std::path::Path| std::fs::read_to_string(file).unwrap();
        let (older, newer) = (read(&folder.path().join("access.log.1")), read(&file));
        assert!(older.len() <= 1_000 && newer.len() <= 1_000);
        assert_eq!(older.lines().count(), 1_000 / one);
        assert!(newer.lines().last().unwrap().contains("\"path\":\"/29\""));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        // Opened again, it goes on where it was.
        let before = newer.len() as u64;
        assert_eq!(OpenedFile::open(file, 1_000).unwrap().octets, before);
    }

    #[test]
    fn a_full_queue_leaves_lines_out_and_counts_them() {
        let (lines, queue) = sync_channel(1);
        let log = AccessLog { lines, left_out: Counter::default() };
        log.write(Box::default());
        log.write(Box::default());
        log.write(Box::default());
        assert_eq!((queue.try_iter().count(), log.left_out.get()), (1, 2));
    }
}
