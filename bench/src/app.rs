//! The application behind the proxies: HTTP/1.1 with keep-alive, as little work as possible. It runs as a
//! process of its own, so that it can be killed and stopped, and so that its CPU is not counted.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const HEAD_MAX: usize = 16 * 1024;
const BODY_LENGTH: usize = 256;

/// Listens on `listen` until it is killed. Every answer names `name`. The address is written to `announce`.
pub async fn run(name: String, listen: SocketAddr, announce: &Path) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))?;
    let temporary = announce.with_extension("new");
    std::fs::write(&temporary, listener.local_addr()?.to_string())?;
    std::fs::rename(&temporary, announce)?;
    let small: &'static [u8] = answer(&name, BODY_LENGTH).leak();
    loop {
        let (stream, _) = listener.accept().await?;
        let name = name.clone();
        tokio::spawn(async move {
            // The far side may end a connection as it likes.
            let _ = serve(stream, &name, small).await;
        });
    }
}

async fn serve(mut stream: TcpStream, name: &str, small: &[u8]) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(HEAD_MAX);
    loop {
        let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") else {
            if buffer.len() > HEAD_MAX || stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
            continue;
        };
        let head: Vec<u8> = buffer.drain(..end + 4).collect();
        match bulk_length(&head) {
            None => stream.write_all(small).await?,
            Some(length) => send_bulk(&mut stream, name, length).await?,
        }
    }
}

/// `GET /bulk/<bytes>` asks for so many bytes; any other path for the small answer.
fn bulk_length(head: &[u8]) -> Option<u64> {
    let line = std::str::from_utf8(head.split(|byte| *byte == b'\r').next()?).ok()?;
    line.split_once("/bulk/")?.1.split(' ').next()?.parse().ok()
}

async fn send_bulk(stream: &mut TcpStream, name: &str, length: u64) -> std::io::Result<()> {
    stream.write_all(head(name, length).as_bytes()).await?;
    let chunk = vec![b'x'; 256 * 1024];
    let mut left = length;
    while left > 0 {
        let now = chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        stream.write_all(&chunk[..now]).await?;
        left -= now as u64;
    }
    Ok(())
}

fn head(name: &str, length: u64) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nx-app: {name}\r\ncontent-length: {length}\r\n\r\n")
}

fn answer(name: &str, length: usize) -> Vec<u8> {
    let mut bytes = head(name, length as u64).into_bytes();
    bytes.resize(bytes.len() + length, b'x');
    bytes
}
