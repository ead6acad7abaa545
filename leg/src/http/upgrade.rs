//! Upgrades (RFC 9110 section 7.8) across a leg, by extended CONNECT (RFC 8441), and the bodies that then carry
//! the upgraded connection's bytes. WebSocket's key and its answer are made anew on each side, as RFC 8441 says.

use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, request};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::oneshot;

use super::BoxError;

/// Octets that are read from an upgraded connection at once.
const CHUNK: usize = 16 * 1024;
/// RFC 6455 section 1.3.
const WEBSOCKET_GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// Longest name of a protocol that is upgraded to.
const PROTOCOL_MAX: usize = 64;

/// The protocol that an HTTP/1.1 request asks to upgrade to. Only the first that it names is offered on;
/// `h2c` is not an upgrade of the application's.
pub fn requested(headers: &HeaderMap) -> Option<&str> {
    let connection = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let asked = connection.flat_map(|value| value.split(',')).any(|name| name.trim().eq_ignore_ascii_case("upgrade"));
    let protocol = headers.get(header::UPGRADE)?.to_str().ok()?.split(',').next()?.trim();
    (asked && !protocol.is_empty() && protocol.len() <= PROTOCOL_MAX && !protocol.eq_ignore_ascii_case("h2c"))
        .then_some(protocol)
}

/// Turns an HTTP/1.1 upgrade into an extended CONNECT; [`super::headers::to_leg`] follows. Returns what the
/// client's own 101 must say in `Sec-WebSocket-Accept`, if it is a WebSocket.
pub fn to_extended_connect(parts: &mut request::Parts) -> Option<HeaderValue> {
    let protocol = requested(&parts.headers)?.to_ascii_lowercase();
    parts.extensions.insert(h2::ext::Protocol::from(protocol.as_str()));
    parts.method = Method::CONNECT;
    let key = parts.headers.remove(header::SEC_WEBSOCKET_KEY);
    // A tunnel has no length.
    parts.headers.remove(header::CONTENT_LENGTH);
    key.map(|key| accept_of(&key))
}

/// Turns an extended CONNECT back into an HTTP/1.1 upgrade; called behind [`super::headers::to_http1`]. `random` is
/// the nonce of the new WebSocket key. Returns what the application's 101 must say in `Sec-WebSocket-Accept`.
pub fn to_http1_upgrade<B>(request: &mut http::Request<B>, random: [u8; 16]) -> Option<HeaderValue> {
    let protocol = request.extensions_mut().remove::<h2::ext::Protocol>()?;
    let name = HeaderValue::from_str(protocol.as_str()).ok()?;
    if let Some(path) = request.uri().path_and_query().cloned() {
        *request.uri_mut() = path.into();
    }
    *request.method_mut() = Method::GET;
    request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    request.headers_mut().insert(header::UPGRADE, name);
    if !protocol.as_str().eq_ignore_ascii_case("websocket") {
        return None;
    }
    let key = HeaderValue::from_str(&STANDARD.encode(random)).expect("base64 is a valid header value");
    let accept = accept_of(&key);
    request.headers_mut().insert(header::SEC_WEBSOCKET_KEY, key);
    Some(accept)
}

/// `Sec-WebSocket-Accept` for a key (RFC 6455 section 4.2.2).
pub fn accept_of(key: &HeaderValue) -> HeaderValue {
    let mut sha1 = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    sha1.update(key.as_bytes());
    sha1.update(WEBSOCKET_GUID);
    HeaderValue::from_str(&STANDARD.encode(sha1.finish())).expect("base64 is a valid header value")
}

/// A body made of what is read from a connection: its end is the connection's half-close, its failure a reset.
#[derive(Debug)]
pub struct IoBody<R> {
    source: Source<R>,
    buffer: BytesMut,
}

#[derive(Debug)]
enum Source<R> {
    Waiting(oneshot::Receiver<R>),
    Reading(R),
    Done,
}

impl<R> IoBody<R> {
    pub fn new(reader: R) -> Self {
        Self { source: Source::Reading(reader), buffer: BytesMut::new() }
    }

    /// A body whose connection comes later: a client's connection is upgraded only after its answer. Dropping
    /// the sender fails the body.
    pub fn pending() -> (Self, oneshot::Sender<R>) {
        let (sender, receiver) = oneshot::channel();
        (Self { source: Source::Waiting(receiver), buffer: BytesMut::new() }, sender)
    }
}

impl<R: AsyncRead + Unpin> Body for IoBody<R> {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        let this = &mut *self;
        loop {
            match &mut this.source {
                Source::Waiting(receiver) => match ready!(Pin::new(receiver).poll(cx)) {
                    Ok(reader) => this.source = Source::Reading(reader),
                    Err(_) => {
                        this.source = Source::Done;
                        return Poll::Ready(Some(Err(std::io::ErrorKind::ConnectionReset.into())));
                    }
                },
                Source::Reading(reader) => {
                    let read = ready!(poll_read(reader, &mut this.buffer, cx));
                    if !matches!(read, Ok(1..)) {
                        this.source = Source::Done;
                    }
                    return Poll::Ready(match read {
                        Ok(0) => None,
                        Ok(_) => Some(Ok(Frame::data(this.buffer.split().freeze()))),
                        Err(error) => Some(Err(error)),
                    });
                }
                Source::Done => return Poll::Ready(None),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.source, Source::Done)
    }
}

fn poll_read<R: AsyncRead + Unpin>(
    reader: &mut R,
    buffer: &mut BytesMut,
    cx: &mut Context<'_>,
) -> Poll<std::io::Result<usize>> {
    // On the stack, so that an idle connection keeps no buffer.
    let mut chunk = [MaybeUninit::uninit(); CHUNK];
    let mut read = ReadBuf::uninit(&mut chunk);
    ready!(Pin::new(reader).poll_read(cx, &mut read))?;
    buffer.extend_from_slice(read.filled());
    Poll::Ready(Ok(read.filled().len()))
}

/// Writes a body into a connection; its end becomes a half-close. Returns the octets written.
///
/// # Errors
/// When either fails: the caller then drops the other half too, which resets it.
pub async fn write_body<B>(body: B, io: &mut (impl AsyncWrite + Unpin)) -> Result<u64, BoxError>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    let mut body = std::pin::pin!(body);
    let mut written = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(Into::into)?;
        if let Ok(data) = frame.into_data() {
            written += data.len() as u64;
            io.write_all(&data).await?;
            io.flush().await?;
        }
    }
    io.shutdown().await?;
    Ok(written)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::headers;
    use super::*;
    use http::Request;

    #[test]
    fn the_key_of_the_specification_gets_its_answer() {
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(accept_of(&key), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn a_websocket_crosses_and_comes_back() {
        let request = Request::get("/chat?x=1")
            .header("host", "web.shop")
            .header("connection", "keep-alive, Upgrade")
            .header("upgrade", "WebSocket")
            .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
            .header("sec-websocket-version", "13")
            .body(())
            .unwrap();
        let (mut parts, ()) = request.into_parts();
        assert_eq!(to_extended_connect(&mut parts).unwrap(), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        headers::to_leg(&mut parts).unwrap();
        assert_eq!(parts.method, Method::CONNECT);
        assert_eq!(parts.uri, "http://web.shop/chat?x=1");
        assert_eq!(parts.extensions.get::<h2::ext::Protocol>().unwrap().as_str(), "websocket");
        assert!(!parts.headers.contains_key("upgrade") && !parts.headers.contains_key("sec-websocket-key"));

        let mut back = Request::from_parts(parts, ());
        headers::to_http1(&mut back).unwrap();
        let accept = to_http1_upgrade(&mut back, [7; 16]).unwrap();
        assert_eq!(back.method(), Method::GET);
        assert_eq!(back.uri(), "/chat?x=1");
        assert_eq!(back.headers()["host"], "web.shop");
        assert_eq!(back.headers()["upgrade"], "websocket");
        assert_eq!(accept, accept_of(&back.headers()["sec-websocket-key"]));
    }

    #[test]
    fn what_is_no_upgrade() {
        for (connection, upgrade) in [("close", "websocket"), ("upgrade", "h2c"), ("upgrade", " ")] {
            let request =
                Request::get("/").header("connection", connection).header("upgrade", upgrade).body(()).unwrap();
            assert_eq!(requested(request.headers()), None, "{connection} {upgrade}");
        }
    }
}
