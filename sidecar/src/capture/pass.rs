//! A connection passed on as it is: its bytes, half-closes and resets, in both directions.

use std::net::SocketAddr;

use tokio::net::TcpStream;
use tombolo_core::refusal::Refusal;
use tombolo_leg::dial::keep_alive;
use tombolo_leg::opaque::{CopyEnd, copy_both, reset};
use tombolo_runtime::drain::DrainWatch;

use super::loops::{Loops, Remembered};
use super::observe::Observed;
use super::{origin, refuse};
use crate::outbound::observe::Counted;

/// What both directions need to pass a connection on.
pub struct Passage<'a> {
    pub observed: &'a Observed,
    pub drain: &'a DrainWatch,
    pub loops: &'a Loops,
}

/// The far end of a connection that is passed on.
pub struct Far {
    pub tcp: TcpStream,
    _made: Remembered,
}

impl Passage<'_> {
    /// Makes the connection that was meant. The kernel's own limit on how long that takes is the application's too.
    pub async fn dial(&self, origin: SocketAddr) -> Result<Far, (Refusal, String)> {
        let unreachable = |error: std::io::Error| (Refusal::ConnectionLost, format!("{origin}: {error}"));
        let tcp = TcpStream::connect(origin).await.map_err(unreachable)?;
        let local = origin::plain(tcp.local_addr().map_err(unreachable)?);
        let made = self.loops.made(local, origin).map_err(|error| (Refusal::CaptureLoop, error.to_string()))?;
        // Without either it only is slower, or stands longer.
        let _ = tcp.set_nodelay(true);
        keep_alive(&tcp);
        Ok(Far { tcp, _made: made })
    }

    /// Copies until both directions are closed, one end is reset, or the process has drained.
    pub async fn carry(&self, mut near: TcpStream, far: Far) {
        let Far { mut tcp, _made } = far;
        self.observed.passed.inc();
        let _counted = Counted::new(&self.observed.passing);
        keep_alive(&near);
        let end = tokio::select! {
            ended = copy_both(&mut tcp, &mut near) => Some(ended.end),
            () = self.drain.stopped() => None,
        };
        match end {
            Some(CopyEnd::Closed) => {}
            Some(CopyEnd::LegReset(_)) => reset(near),
            Some(CopyEnd::AppReset(_)) => reset(tcp),
            None => {
                reset(near);
                reset(tcp);
            }
        }
    }

    /// Dials and carries.
    pub async fn pass(&self, near: TcpStream, origin: SocketAddr) {
        match self.dial(origin).await {
            Ok(far) => self.carry(near, far).await,
            Err((refusal, detail)) => refuse(self.observed, near, refusal, detail),
        }
    }
}
