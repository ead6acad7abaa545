//! The control stream of a tunnel: hello, probes and their answers, drain.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quinn::{RecvStream, SendStream};
use tokio::sync::mpsc;
use tombolo_api::frame::{self, FrameError};
use tombolo_api::proto::tunnel as wire;
use tombolo_api::proto::tunnel::control::Kind;
use tombolo_core::liveness::{Liveness, LivenessConfig, LivenessEvent, Reach};
use tombolo_core::refusal::Refusal;

use super::connection::{Order, Tunnel};
use super::registry::Registry;
use super::{CLOSE_DONE, close_refused};

/// Largest message on the control stream.
const LENGTH_MAX: usize = 2048;
/// Control goes before the legs' bytes.
const PRIORITY: i32 = 1000;
/// Messages that wait to be written. A probe that finds no room is lost, as it would be on a stuck path.
const QUEUE_MAX: usize = 64;
/// How long a tunnel that another one supersedes is kept without legs.
const LINGER: Duration = Duration::from_secs(3);
/// How often acknowledgements are looked for while legs are in use: of the last one it is known no better when it
/// came, and the silence that makes a tunnel suspect is counted from there.
const LOOK: Duration = Duration::from_millis(25);

/// The two halves of a control stream after the hellos.
pub struct ControlStream {
    pub send: SendStream,
    pub recv: RecvStream,
    buffer: BytesMut,
}

/// Why a control stream broke.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("the control stream ended: {0}")]
    Ended(String),
    #[error("a control message is refused: {0}")]
    Frame(#[from] FrameError),
    #[error("the first control message is no hello")]
    NoHello,
}

impl ControlStream {
    pub fn new(send: SendStream, recv: RecvStream) -> Self {
        // A stream that is closed already fails at the first write.
        let _ = send.set_priority(PRIORITY);
        Self { send, recv, buffer: BytesMut::new() }
    }

    pub async fn write(&mut self, kind: Kind) -> Result<(), ControlError> {
        let bytes = frame::encode(&wire::Control { kind: Some(kind) });
        self.send.write_all(&bytes).await.map_err(|error| ControlError::Ended(error.to_string()))
    }

    /// The far end's hello, which comes before anything else.
    pub async fn read_hello(&mut self) -> Result<wire::ControlHello, ControlError> {
        match read(&mut self.recv, &mut self.buffer).await? {
            Some(Kind::Hello(hello)) => Ok(hello),
            _ => Err(ControlError::NoHello),
        }
    }
}

/// The next message; `None` for one of a newer release. Nothing is lost when this is dropped half-way.
async fn read(recv: &mut RecvStream, buffer: &mut BytesMut) -> Result<Option<Kind>, ControlError> {
    loop {
        if let Some((message, length)) = frame::decode::<wire::Control>(buffer, LENGTH_MAX)? {
            let _ = buffer.split_to(length);
            return Ok(message.kind);
        }
        match recv.read_chunk(LENGTH_MAX, true).await {
            Ok(Some(chunk)) => buffer.extend_from_slice(&chunk.bytes),
            Ok(None) => return Err(ControlError::Ended("closed by the far end".into())),
            Err(error) => return Err(ControlError::Ended(error.to_string())),
        }
    }
}

/// Runs the control stream until the connection ends.
pub async fn run(
    tunnel: Arc<Tunnel>,
    registry: Registry,
    config: LivenessConfig,
    stream: ControlStream,
    mut orders: mpsc::Receiver<Order>,
) {
    let ControlStream { send, mut recv, mut buffer } = stream;
    let (queue, queued) = mpsc::channel(QUEUE_MAX);
    tokio::spawn(write_queued(send, queued));
    let mut control = Control {
        liveness: Liveness::new(config, Instant::now()),
        queue,
        acks: 0,
        unused_since: None,
        tunnel,
        registry,
    };
    loop {
        control.perform();
        let wake = control.next_wake();
        let tunnel = control.tunnel.clone();
        tokio::select! {
            message = read(&mut recv, &mut buffer) => match message {
                Ok(message) => control.handle_message(message),
                Err(ControlError::Ended(_)) => break,
                Err(error) => {
                    tracing::warn!(peer = %tunnel.remote.cluster, %error, "tunnel closed");
                    close_refused(&tunnel.connection, Refusal::BadHeader);
                    break;
                }
            },
            Some(order) = orders.recv() => control.handle_order(order),
            () = tunnel.use_changed() => control.handle_use(),
            () = tunnel.said_unreachable() => control.handle_unreachable(),
            () = tokio::time::sleep_until(wake.into()) => control.handle_wake(),
        }
    }
    control.tunnel.connection.close(CLOSE_DONE, b"control stream ended");
}

async fn write_queued(mut send: SendStream, mut queued: mpsc::Receiver<Kind>) {
    while let Some(kind) = queued.recv().await {
        let bytes = frame::encode(&wire::Control { kind: Some(kind) });
        if send.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

struct Control {
    tunnel: Arc<Tunnel>,
    registry: Registry,
    liveness: Liveness,
    queue: mpsc::Sender<Kind>,
    /// Acknowledgements seen so far: they are signs of life too.
    acks: u64,
    unused_since: Option<Instant>,
}

impl Control {
    fn say(&self, kind: Kind) {
        let _ = self.queue.try_send(kind);
    }

    fn handle_message(&mut self, message: Option<Kind>) {
        let now = Instant::now();
        match message {
            Some(Kind::Probe(probe)) => {
                self.say(Kind::ProbeAnswer(wire::ProbeAnswer { sequence: probe.sequence }));
                self.liveness.handle_heard(now);
            }
            Some(Kind::ProbeAnswer(answer)) => self.liveness.handle_answer(answer.sequence, now),
            Some(Kind::Drain(drain)) => {
                tracing::info!(peer = %self.tunnel.remote.cluster, gateway = %self.tunnel.remote.gateway,
                    deadline_ms = drain.deadline_ms, "the far gateway drains");
                self.tunnel.set_remote_draining();
                self.registry.settle();
            }
            // A second hello, or a message of a newer release.
            Some(Kind::Hello(_)) | None => self.liveness.handle_heard(now),
        }
    }

    fn handle_order(&mut self, order: Order) {
        match order {
            Order::Drain(deadline) => {
                let deadline_ms = deadline.as_millis().try_into().unwrap_or(u32::MAX);
                self.say(Kind::Drain(wire::Drain { deadline_ms }));
            }
        }
    }

    fn handle_use(&mut self) {
        self.liveness.handle_in_use(self.tunnel.legs() > 0);
        let unused = self.tunnel.legs() == 0 && self.tunnel.is_surplus() && self.tunnel.dialled_here;
        self.unused_since = unused.then(|| self.unused_since.unwrap_or_else(Instant::now));
    }

    fn next_wake(&self) -> Instant {
        let linger = self.unused_since.map(|since| since + LINGER);
        let look = (self.tunnel.legs() > 0).then(|| Instant::now() + LOOK);
        let wakes = linger.into_iter().chain(self.liveness.poll_timeout()).chain(look);
        wakes.min().unwrap_or_else(|| Instant::now() + Duration::from_secs(60))
    }

    fn handle_wake(&mut self) {
        let now = Instant::now();
        self.hear_acks(now);
        self.tunnel.refresh_rtt();
        self.liveness.handle_timeout(now);
        if self.unused_since.is_some_and(|since| since + LINGER <= now) {
            self.tunnel.connection.close(CLOSE_DONE, b"superseded");
        }
    }

    fn handle_unreachable(&mut self) {
        let now = Instant::now();
        self.hear_acks(now);
        self.liveness.handle_unreachable(now);
    }

    fn hear_acks(&mut self, now: Instant) {
        let acks = self.tunnel.connection.stats().frame_rx.acks;
        if acks != self.acks {
            self.acks = acks;
            self.liveness.handle_heard(now);
        }
    }

    fn perform(&mut self) {
        while let Some(event) = self.liveness.poll_event() {
            match event {
                LivenessEvent::SendProbe(sequence) => self.say(Kind::Probe(wire::Probe { sequence })),
                LivenessEvent::Reach(reach) => self.become_reach(reach),
            }
        }
    }

    fn become_reach(&mut self, reach: Reach) {
        let remote = &self.tunnel.remote;
        tracing::info!(peer = %remote.cluster, gateway = %remote.gateway, ?reach, "tunnel");
        self.tunnel.set_reach(reach);
        self.registry.settle();
        if reach == Reach::Dead {
            close_refused(&self.tunnel.connection, Refusal::Timeout);
        }
    }
}
