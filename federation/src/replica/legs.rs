//! Legs of peer sync at a replica that does not lead.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::kubernetes::Leader;

/// Legs that are passed on at once; there is one for each peer.
const LEGS_MAX: usize = 1_024;
const CONNECT_TIME_MAX: Duration = Duration::from_secs(2);
/// Pause after `accept` failed, which it does when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Passes each leg that a gateway brings on to the leader, which alone can open it. Never ends; all legs end with it.
pub async fn pass_legs_on(listener: &TcpListener, leader: watch::Receiver<Option<Leader>>) {
    let room = Arc::new(Semaphore::new(LEGS_MAX));
    let mut legs = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = legs.join_next() => continue,
        };
        let mut leg = match accepted {
            Ok((leg, _)) => leg,
            Err(error) => {
                tracing::warn!(%error, "can't accept a leg of peer sync");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (Ok(place), Some(leader)) = (room.clone().try_acquire_owned(), leader.borrow().clone()) else { continue };
        legs.spawn(async move {
            let _place = place;
            match timeout(CONNECT_TIME_MAX, TcpStream::connect(&leader.legs)).await {
                Ok(Ok(mut onward)) => _ = copy_bidirectional(&mut leg, &mut onward).await,
                Ok(Err(error)) => tracing::debug!(leader = leader.holder, %error, "the leader can't be reached"),
                Err(_) => tracing::debug!(leader = leader.holder, "the leader does not answer"),
            }
        });
    }
}
