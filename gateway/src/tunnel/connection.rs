//! One tunnel connection with one gateway of a peer, and what is known of it.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use rustls::pki_types::{CertificateDer, UnixTime};
use tokio::sync::{Notify, mpsc};
use tombolo_core::id::{ClusterId, GatewayId, SpiffeId};
use tombolo_core::liveness::Reach;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Who is at the far end, as its certificate proved.
#[derive(Debug, Clone)]
pub struct Remote {
    pub cluster: ClusterId,
    pub gateway: GatewayId,
    pub spiffe_id: SpiffeId,
    /// Leaf first, as it was presented.
    pub chain: Vec<CertificateDer<'static>>,
    pub validity: Validity,
}

/// When a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    pub not_before: UnixTime,
    pub not_after: UnixTime,
}

impl Validity {
    /// Of the leaf of a chain that was verified. A leaf that can't be read is valid at no time.
    pub fn of_leaf(chain: &[CertificateDer<'_>]) -> Self {
        let seconds = |time: x509_parser::time::ASN1Time| {
            UnixTime::since_unix_epoch(Duration::from_secs(time.timestamp().try_into().unwrap_or(0)))
        };
        let parsed = chain.first().and_then(|leaf| X509Certificate::from_der(leaf).ok());
        let (not_before, not_after) = parsed.map_or((0, 0), |(_, certificate)| {
            let validity = certificate.validity();
            (seconds(validity.not_before).as_secs(), seconds(validity.not_after).as_secs())
        });
        let at = |second| UnixTime::since_unix_epoch(Duration::from_secs(second));
        Self { not_before: at(not_before), not_after: at(not_after) }
    }

    pub fn life(&self) -> Duration {
        Duration::from_secs(self.not_after.as_secs().saturating_sub(self.not_before.as_secs()))
    }

    pub fn has_ended(&self, now: UnixTime) -> bool {
        self.not_after < now
    }
}

/// What the control stream's task is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Tell the far end that no new legs are wanted and when the rest ends.
    Drain(Duration),
}

/// One tunnel connection. Shared between its control task, the legs on it and the registry.
#[derive(Debug)]
pub struct Tunnel {
    pub connection: quinn::Connection,
    pub remote: Remote,
    pub dialled_here: bool,
    /// Counts tunnels of this process in the order in which they came up.
    pub number: u64,
    pub established: UnixTime,
    orders: mpsc::Sender<Order>,
    use_changed: Notify,
    unreachable: Notify,
    reach_changed: Notify,
    legs: AtomicU32,
    reach: AtomicU8,
    rtt_us: AtomicU64,
    surplus: AtomicBool,
    remote_draining: AtomicBool,
}

impl Tunnel {
    pub fn new(
        connection: quinn::Connection,
        remote: Remote,
        dialled_here: bool,
        number: u64,
    ) -> (Self, mpsc::Receiver<Order>) {
        // A second drain order would say nothing new.
        let (orders, receiver) = mpsc::channel(1);
        let rtt_us = AtomicU64::new(connection.rtt().as_micros().try_into().unwrap_or(u64::MAX));
        let tunnel = Self {
            connection,
            remote,
            dialled_here,
            number,
            established: UnixTime::now(),
            orders,
            use_changed: Notify::new(),
            unreachable: Notify::new(),
            reach_changed: Notify::new(),
            legs: AtomicU32::new(0),
            reach: AtomicU8::new(Reach::Up as u8),
            rtt_us,
            surplus: AtomicBool::new(false),
            remote_draining: AtomicBool::new(false),
        };
        (tunnel, receiver)
    }

    pub fn remote_address(&self) -> SocketAddr {
        self.connection.remote_address()
    }

    pub fn reach(&self) -> Reach {
        match self.reach.load(Ordering::Relaxed) {
            reach if reach == Reach::Up as u8 => Reach::Up,
            reach if reach == Reach::Suspect as u8 => Reach::Suspect,
            _ => Reach::Dead,
        }
    }

    pub fn set_reach(&self, reach: Reach) {
        self.reach.store(reach as u8, Ordering::Relaxed);
        self.reach_changed.notify_waiters();
    }

    /// Completes when the far end does not answer.
    pub async fn suspected(&self) {
        loop {
            let mut changed = pin!(self.reach_changed.notified());
            // Whatever changes after the look wakes it.
            changed.as_mut().enable();
            if self.reach() != Reach::Up {
                return;
            }
            changed.await;
        }
    }

    /// A host on the way says that nobody is at the far end, which is not proved.
    pub fn unreachable(&self) {
        self.unreachable.notify_one();
    }

    /// Completes when that has been said.
    pub(super) async fn said_unreachable(&self) {
        self.unreachable.notified().await;
    }

    pub fn rtt(&self) -> Duration {
        Duration::from_micros(self.rtt_us.load(Ordering::Relaxed))
    }

    /// Octets of a datagram that the path carries, as far as was found out (RFC 8899).
    pub fn mtu(&self) -> u32 {
        self.connection.stats().path.current_mtu.into()
    }

    pub fn refresh_rtt(&self) {
        let rtt = self.connection.rtt().as_micros().try_into().unwrap_or(u64::MAX);
        self.rtt_us.store(rtt, Ordering::Relaxed);
    }

    /// Whether the far gateway has said that it drains.
    pub fn is_remote_draining(&self) -> bool {
        self.remote_draining.load(Ordering::Relaxed)
    }

    pub fn set_remote_draining(&self) {
        self.remote_draining.store(true, Ordering::Relaxed);
    }

    /// Whether another tunnel with the same gateway takes the new legs.
    pub fn is_surplus(&self) -> bool {
        self.surplus.load(Ordering::Relaxed)
    }

    /// Returns whether that changed.
    pub fn set_surplus(&self, surplus: bool) -> bool {
        let changed = self.surplus.swap(surplus, Ordering::Relaxed) != surplus;
        if changed {
            self.use_changed.notify_one();
        }
        changed
    }

    /// Whether it could take new legs, if no better one did.
    pub fn is_usable(&self, now: UnixTime) -> bool {
        self.reach() == Reach::Up
            && !self.is_remote_draining()
            && !self.remote.validity.has_ended(now)
            && self.connection.close_reason().is_none()
    }

    pub fn order(&self, order: Order) {
        // Full or closed: it drains or is gone already.
        let _ = self.orders.try_send(order);
    }

    pub fn legs(&self) -> u32 {
        self.legs.load(Ordering::Relaxed)
    }

    pub(super) fn leg_opened(&self) {
        if self.legs.fetch_add(1, Ordering::Relaxed) == 0 {
            self.use_changed.notify_one();
        }
    }

    pub(super) fn leg_closed(&self) {
        if self.legs.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.use_changed.notify_one();
        }
    }

    /// Completes when the tunnel came into use, out of use, or lost its place to another.
    pub(super) async fn use_changed(&self) {
        self.use_changed.notified().await;
    }
}
