//! Redirected connections of this host's processes. The address decides at once: one of the mesh is carried as the
//! service that has it, any other is passed on unchanged. What is the mesh's and can't be carried is reset; it is never
//! passed on, for that would send it out in plaintext.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tombolo_core::addresses::mesh::{Lookup, MeshAddresses};
use tombolo_core::refusal::Refusal;
use tombolo_runtime::drain::DrainWatch;

use super::loops::Loops;
use super::observe::{Meters, Observed};
use super::pass::Passage;
use super::{Captured, refuse};
use crate::config::ServicePortName;
use crate::outbound::http::Caller;
use crate::outbound::{Outbound, listener};

pub struct CapturedOutbound {
    outbound: Arc<Outbound>,
    addresses: watch::Receiver<MeshAddresses>,
    wait: Duration,
    loops: Loops,
    observed: Observed,
    room: Arc<Semaphore>,
}

impl CapturedOutbound {
    pub fn new(
        outbound: Arc<Outbound>,
        addresses: watch::Receiver<MeshAddresses>,
        wait: Duration,
        loops: Loops,
        meters: &Meters,
    ) -> Arc<Self> {
        let room = Arc::new(Semaphore::new(outbound.connections_max));
        Arc::new(Self { outbound, addresses, wait, loops, observed: meters.of("outbound"), room })
    }

    /// What the address is to the mesh; waits a little while that is not known.
    async fn lookup(&self, origin: SocketAddr) -> Lookup {
        let at_once = self.addresses.borrow().lookup(origin.ip());
        if at_once != Lookup::NotReadyYet {
            return at_once;
        }
        let mut addresses = self.addresses.clone();
        let known = addresses.wait_for(|addresses| addresses.lookup(origin.ip()) != Lookup::NotReadyYet);
        match tokio::time::timeout(self.wait, known).await {
            Ok(Ok(addresses)) => addresses.lookup(origin.ip()),
            Ok(Err(_)) | Err(_) => Lookup::NotReadyYet,
        }
    }
}

impl Captured for CapturedOutbound {
    fn observed(&self) -> &Observed {
        &self.observed
    }

    fn drain(&self) -> &DrainWatch {
        &self.outbound.drain
    }

    fn room(&self) -> &Arc<Semaphore> {
        &self.room
    }

    async fn serve(self: Arc<Self>, connection: TcpStream, peer: SocketAddr, origin: SocketAddr) {
        let _taken = match self.loops.taken(peer, origin) {
            Ok(taken) => taken,
            Err(error) => return refuse(&self.observed, connection, Refusal::CaptureLoop, error),
        };
        match self.lookup(origin).await {
            Lookup::NotMesh => {
                let passage = Passage { observed: &self.observed, drain: &self.outbound.drain, loops: &self.loops };
                passage.pass(connection, origin).await;
            }
            Lookup::Mesh(service) => {
                self.observed.mesh.inc();
                let fixed = Arc::new(ServicePortName { service, port: origin.port() });
                listener::serve(&self.outbound, connection, Caller { address: peer, fixed: Some(fixed) }).await;
            }
            Lookup::Unassigned => {
                let detail = format!("{origin} is a virtual address that no service has; is an old DNS answer in use?");
                refuse(&self.observed, connection, Refusal::UnknownService, detail);
            }
            Lookup::NotReadyYet => {
                let detail = format!("{origin} may be a virtual address, but the federation has not told all of them");
                refuse(&self.observed, connection, Refusal::Timeout, detail);
            }
        }
    }
}
