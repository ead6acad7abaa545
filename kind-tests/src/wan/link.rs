//! The shell round [`Direction`]: the devices, and a thread for each direction.

use std::io::{self, ErrorKind, PipeReader, PipeWriter};
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use tombolo_testbed::Namespace;
use tun_rs::{DeviceBuilder, SyncDevice};

use super::conditions::{Conditions, Side};
use super::direction::{Counts, Direction};

const MTU: u16 = 1500;
/// Packets that wait in the kernel for the emulator: enough that none is lost outside of its model.
const QUEUE_LENGTH: &str = "10000";
/// Packets that are read in a row before those that have arrived are looked at again.
const BATCH: usize = 32;

/// One end of a link: a device in a namespace.
#[derive(Debug, Clone, Copy)]
pub struct End<'a> {
    pub namespace: &'a Namespace,
    pub device: &'a str,
    /// Each with its prefix length: `10.9.0.1/24`. What the prefixes hold is routed over the link.
    pub addresses: &'a [&'a str],
}

/// A running link. Dropping it removes both devices.
pub struct Wan {
    directions: [Arc<Mutex<Direction>>; 2],
    stop: Option<PipeWriter>,
    threads: Vec<JoinHandle<()>>,
}

impl Wan {
    /// Joins two namespaces by a perfect link. The same seed loses the same packets.
    pub fn join(a: End<'_>, b: End<'_>, seed: u64) -> anyhow::Result<Self> {
        let [a, b] = [device(a)?, device(b)?].map(Arc::new);
        let (stopped, stop) = io::pipe()?;
        let directions = [seed.wrapping_mul(2), seed.wrapping_mul(2).wrapping_add(1)]
            .map(|seed| Arc::new(Mutex::new(Direction::new(seed))));
        let mut threads = Vec::new();
        for (direction, from, to) in [(&directions[0], a.clone(), b.clone()), (&directions[1], b, a)] {
            let carrier = Carrier { direction: direction.clone(), from, to, stopped: stopped.try_clone()? };
            threads.push(std::thread::Builder::new().name("wan".into()).spawn(move || carrier.run())?);
        }
        Ok(Self { directions, stop: Some(stop), threads })
    }

    /// Changes the conditions of what leaves one side, or both.
    pub fn change(&self, side: Side, change: impl Fn(&mut Conditions)) {
        let sides = match side {
            Side::A => &self.directions[..1],
            Side::B => &self.directions[1..],
            Side::Both => &self.directions[..],
        };
        for direction in sides {
            lock(direction).change(&change);
        }
    }

    /// Of the packets that left A, and of those that left B.
    pub fn counts(&self) -> (Counts, Counts) {
        (lock(&self.directions[0]).counts(), lock(&self.directions[1]).counts())
    }
}

impl Drop for Wan {
    fn drop(&mut self) {
        // The threads see the pipe's end.
        self.stop = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn lock(direction: &Mutex<Direction>) -> MutexGuard<'_, Direction> {
    direction.lock().unwrap_or_else(PoisonError::into_inner)
}

fn device(end: End<'_>) -> anyhow::Result<SyncDevice> {
    let name = end.device;
    let made = end.namespace.within(|| DeviceBuilder::new().name(name).enable(false).build_sync())?;
    let device = made.with_context(|| format!("making the TUN device {name}"))?;
    device.set_nonblocking(true)?;
    // Only what its users send is to cross the link, nothing that the kernel says by itself.
    let quiet = ["link", "set", name, "multicast", "off", "addrgenmode", "none"];
    end.namespace.ip(&[&quiet[..], &["mtu", &MTU.to_string(), "txqueuelen", QUEUE_LENGTH]].concat())?;
    if !end.addresses.iter().any(|address| address.contains(':')) {
        let switch = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
        // A kernel without IPv6 has no switch for it.
        let _ = end.namespace.within(|| std::fs::write(switch, "1"))?;
    }
    for address in end.addresses {
        // IPv6 would hold an address back until nobody else has claimed it; here nobody can.
        let nodad: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
        end.namespace.ip(&[&["address", "add", address, "dev", name], nodad].concat())?;
    }
    end.namespace.ip(&["link", "set", name, "up"])?;
    Ok(device)
}

/// Carries the packets of one direction.
struct Carrier {
    direction: Arc<Mutex<Direction>>,
    from: Arc<SyncDevice>,
    to: Arc<SyncDevice>,
    stopped: PipeReader,
}

impl Carrier {
    fn run(self) {
        // The default of 50 us would add to every delay. Without it the link is only less exact.
        let _ = nix::sys::prctl::set_timerslack(1);
        let mut buffer = vec![0; usize::from(MTU) + 64];
        loop {
            let next = lock(&self.direction).poll_timeout();
            let wait = next.map(|at| at.saturating_duration_since(Instant::now()));
            match self.readable(wait) {
                Ok(Ready { stop: true, .. }) | Err(_) => return,
                Ok(Ready { packets: true, .. }) => {
                    if !self.take_in(&mut buffer) {
                        return;
                    }
                }
                Ok(_) => {}
            }
            self.hand_out();
        }
    }

    /// Waits until there is something to do, or for so long.
    fn readable(&self, wait: Option<Duration>) -> nix::Result<Ready> {
        let mut waited =
            [PollFd::new(self.from.as_fd(), PollFlags::POLLIN), PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN)];
        match ppoll(&mut waited, wait.map(TimeSpec::from), None) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        let [packets, stop] = waited.map(|waited| waited.any().unwrap_or(false));
        Ok(Ready { packets, stop })
    }

    /// Reads what is there. `false` when the device is gone.
    fn take_in(&self, buffer: &mut [u8]) -> bool {
        for _ in 0..BATCH {
            match self.from.recv(buffer) {
                Ok(length) => lock(&self.direction).handle_packet(&buffer[..length], Instant::now()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }

    fn hand_out(&self) {
        loop {
            let packet = lock(&self.direction).poll_packet(Instant::now());
            let Some(packet) = packet else { return };
            // A device that has no room loses it, as a network card would.
            let _ = self.to.send(&packet);
        }
    }
}

struct Ready {
    packets: bool,
    stop: bool,
}
