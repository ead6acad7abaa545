//! A client that knows of no sidecar, and ports for the listeners that it calls.

use std::net::{SocketAddr, TcpListener};
use std::process::Stdio;

use tokio::process::Command;

use super::until;

/// Four ports in a row that nobody listens on, as a range.
pub fn free_ports() -> String {
    const COUNT: u16 = 4;
    for _ in 0..100 {
        let first = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let Some(last) = first.checked_add(COUNT - 1) else { continue };
        if (first..=last).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return format!("{first}-{last}");
        }
    }
    panic!("no {COUNT} free ports in a row");
}

/// What a plain `curl` gets there; `None` when it gets nothing.
pub async fn plain(listener: SocketAddr) -> Option<String> {
    let url = format!("http://{listener}/");
    let output = Command::new("curl").args(["-sS", "-m", "5", &url]).stdin(Stdio::null()).output().await.unwrap();
    let body = String::from_utf8_lossy(&output.stdout).into_owned();
    output.status.success().then_some(body)
}

pub async fn plain_until(listener: SocketAddr, name: &str) {
    until(&format!("{name} to answer at {listener}"), async || {
        plain(listener).await.filter(|body| body.starts_with(name)).map(drop)
    })
    .await;
}
