//! One request to an admin port, or to whatever else answers in clear text.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const TIME_MAX: Duration = Duration::from_secs(30);

/// The body of the answer to `GET path`, which must be 200.
pub async fn get(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let asked = async {
        let mut tcp = TcpStream::connect(address).await?;
        // HTTP/1.0: the body ends with the connection.
        tcp.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).await?;
        anyhow::Ok(answer)
    };
    let answer =
        tokio::time::timeout(TIME_MAX, asked).await.with_context(|| format!("{address} does not answer"))??;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a head")?;
    let status = head.lines().next().unwrap_or_default();
    anyhow::ensure!(status.contains(" 200 "), "{address}: {status} to {path}");
    Ok(body.to_owned())
}
