//! One HTTP/1.1 connection over a bare socket: the generator must cost less than what it measures.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use anyhow::{Context as _, bail};
use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// What to call: where to connect, and the bytes of the request.
#[derive(Debug, Clone)]
pub struct Target {
    pub address: SocketAddr,
    host: String,
    /// In front of the path: empty, or `http://host` for a forward proxy.
    prefix: String,
}

impl Target {
    /// Requests as an application sends them to a listener that leads to one service.
    pub fn direct(address: SocketAddr, host: &str) -> Self {
        Self { address, host: host.to_owned(), prefix: String::new() }
    }

    /// Requests as an application sends them to its forward proxy.
    pub fn proxied(address: SocketAddr, host: &str) -> Self {
        Self { address, host: host.to_owned(), prefix: format!("http://{host}") }
    }

    pub fn request(&self, path: &str) -> Vec<u8> {
        self.request_with(path, "")
    }

    /// The same with further header lines, each with its line end.
    pub fn request_with(&self, path: &str, headers: &str) -> Vec<u8> {
        format!("GET {}{path} HTTP/1.1\r\nhost: {}\r\n{headers}\r\n", self.prefix, self.host).into_bytes()
    }
}

#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// Connects; to loopback from an address that no connection of the last minute had. A closed connection's port rests for a
/// minute, and to find one that does not was two thirds of what ten thousand connections a second from one address cost.
async fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    const ADDRESSES: u32 = 1 << 20;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    if address.ip() != IpAddr::V4(Ipv4Addr::LOCALHOST) {
        return TcpStream::connect(address).await;
    }
    let source = u32::from(Ipv4Addr::new(127, 64, 0, 1)) + NEXT.fetch_add(1, Relaxed) % ADDRESSES;
    let socket = TcpSocket::new_v4()?;
    setsockopt(&socket, IpBindAddressNoPort, &true)?;
    socket.bind(SocketAddr::new(Ipv4Addr::from(source).into(), 0))?;
    socket.connect(address).await
}

/// An answer: its status, which application gave it (`x-app`), and which way it went if that was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub app: Option<String>,
    /// `tombolo-path`, as in `east/gw-1 > west/gw`.
    pub path: Option<String>,
    pub keep_alive: bool,
    pub body_length: u64,
}

enum BodyEnd {
    Length(u64),
    Chunked,
}

impl Connection {
    pub async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = connect(address).await.with_context(|| format!("connecting to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(64 * 1024) })
    }

    /// Sends `request` and reads its answer to the end of the body.
    pub async fn exchange(&mut self, request: &[u8]) -> anyhow::Result<Answer> {
        self.stream.write_all(request).await?;
        let head_end = loop {
            if let Some(at) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            self.fill().await?;
        };
        let (mut answer, end) = parse_head(&self.buffer[..head_end])?;
        self.buffer.drain(..head_end);
        answer.body_length = match end {
            BodyEnd::Length(length) => self.skip(length).await?,
            BodyEnd::Chunked => self.skip_chunks().await?,
        };
        Ok(answer)
    }

    async fn fill(&mut self) -> anyhow::Result<()> {
        if self.stream.read_buf(&mut self.buffer).await? == 0 {
            bail!("the connection was closed before the answer's end");
        }
        Ok(())
    }

    /// Reads and forgets `length` bytes.
    async fn skip(&mut self, length: u64) -> anyhow::Result<u64> {
        let mut left = length;
        loop {
            let now = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            self.buffer.drain(..now);
            left -= now as u64;
            if left == 0 {
                return Ok(length);
            }
            self.fill().await?;
        }
    }

    async fn skip_chunks(&mut self) -> anyhow::Result<u64> {
        let mut total = 0;
        loop {
            let line_end = loop {
                if let Some(at) = self.buffer.windows(2).position(|window| window == b"\r\n") {
                    break at;
                }
                self.fill().await?;
            };
            let size = std::str::from_utf8(&self.buffer[..line_end])?.split(';').next().unwrap_or_default().trim();
            let size = u64::from_str_radix(size, 16).context("a chunk's size")?;
            self.buffer.drain(..line_end + 2);
            // The chunk and its line end; after the last chunk the empty trailer section.
            self.skip(size + 2).await?;
            total += size;
            if size == 0 {
                return Ok(total);
            }
        }
    }
}

fn parse_head(head: &[u8]) -> anyhow::Result<(Answer, BodyEnd)> {
    let text = std::str::from_utf8(head).context("the answer's head")?;
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|status| status.parse().ok());
    let status = status.context("the answer's status")?;
    let mut answer = Answer { status, app: None, path: None, keep_alive: true, body_length: 0 };
    let mut end = BodyEnd::Length(0);
    for line in lines {
        let Some((name, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => end = BodyEnd::Length(value.parse().context("content-length")?),
            "transfer-encoding" => end = BodyEnd::Chunked,
            "connection" => answer.keep_alive = !value.eq_ignore_ascii_case("close"),
            "x-app" => answer.app = Some(value.to_owned()),
            "tombolo-path" => answer.path = Some(value.to_owned()),
            _ => {}
        }
    }
    Ok((answer, end))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::net::TcpListener;

    /// What the client makes of `answers`, sent one octet at a time.
    async fn exchanged(answers: &'static [u8]) -> Vec<anyhow::Result<Answer>> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let (mut tcp, _) = listener.accept().await.unwrap();
            tcp.set_nodelay(true).unwrap();
            for octet in answers {
                tcp.write_all(&[*octet]).await.unwrap();
            }
            tcp.shutdown().await.unwrap();
            // Closed with something unread, it would reset.
            tcp.read_to_end(&mut Vec::new()).await.unwrap();
        });
        let target = Target::proxied(address, "web");
        let mut connection = Connection::open(address).await.unwrap();
        let mut got = Vec::new();
        for _ in 0..2 {
            got.push(connection.exchange(&target.request("/")).await);
        }
        drop(connection);
        serving.await.unwrap();
        got
    }

    #[tokio::test]
    async fn answers_are_read_to_their_ends() {
        let by_length = b"HTTP/1.1 200 OK\r\nX-App: east\r\ntombolo-path: east/gw > west/gw\r\n\
            Content-Length: 3\r\n\r\nabcHTTP/1.1 503 No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        let got = exchanged(by_length).await;
        let answer = |status, app: Option<&str>, path: Option<&str>, keep_alive, body_length| {
            let (app, path) = (app.map(str::to_owned), path.map(str::to_owned));
            Answer { status, app, path, keep_alive, body_length }
        };
        assert_eq!(*got[0].as_ref().unwrap(), answer(200, Some("east"), Some("east/gw > west/gw"), true, 3));
        assert_eq!(*got[1].as_ref().unwrap(), answer(503, None, None, false, 0));
        let got =
            exchanged(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\nHTTP/1.1 2").await;
        assert_eq!(got[0].as_ref().unwrap().body_length, 2);
        assert!(got[1].is_err(), "an answer without an end");
    }
}
