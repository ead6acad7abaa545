//! Opaque connections that stand across a gateway of this cluster, and their end when that answers nothing any more.
//!
//! Bytes have no question that could be asked among them, so the gateway is asked beside them, with a leg of its
//! own: for as long as something stands across it, and only while it says nothing of itself
//! (`tombolo_core::silence`).

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tombolo_core::silence::{Look, Silence, SilenceConfig};

use super::dial::LegDialer;
use super::gateways::Gateway;
use super::target::{Target, lock};

/// How often a gateway is looked at across which something stands; oftener where there is less patience.
const STEP: Duration = Duration::from_secs(1);

/// What stands across one gateway.
#[derive(Debug, Default)]
pub struct Standing {
    state: Mutex<State>,
    given_up: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    connections: usize,
    /// Somebody looks after them.
    kept: bool,
}

/// One connection's place in it.
pub struct Crossing {
    gateway: Arc<Gateway>,
    given_up: watch::Receiver<u64>,
}

impl Crossing {
    /// Counts a connection to `target` across `gateway`.
    pub fn begin(dialer: &Arc<LegDialer>, gateway: &Arc<Gateway>, target: &Arc<Target>) -> Self {
        let standing = &gateway.standing;
        let given_up = standing.given_up.subscribe();
        let mut state = lock(&standing.state);
        state.connections += 1;
        if !std::mem::replace(&mut state.kept, true) {
            tokio::spawn(keep(dialer.clone(), gateway.clone(), target.clone()));
        }
        drop(state);
        Self { gateway: gateway.clone(), given_up }
    }

    /// Completes when the gateway has answered nothing for too long.
    pub async fn given_up(&mut self) {
        if self.given_up.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Crossing {
    fn drop(&mut self) {
        lock(&self.gateway.standing.state).connections -= 1;
    }
}

/// Looks after what stands across a gateway, for as long as something does. The target is whom legs that ask go to.
async fn keep(dialer: Arc<LegDialer>, gateway: Arc<Gateway>, target: Arc<Target>) {
    let config: SilenceConfig = dialer.patience;
    let mut silence = Silence::new(config, Instant::now());
    loop {
        tokio::time::sleep(STEP.min(config.ask_every)).await;
        {
            let mut state = lock(&gateway.standing.state);
            if state.connections == 0 {
                state.kept = false;
                return;
            }
        }
        if gateway.says_of_itself() {
            silence.handle_heard(Instant::now());
            continue;
        }
        match silence.handle_silence(Instant::now()) {
            Look::Wait => {}
            Look::Ask => {
                if dialer.answers(&gateway, &target).await {
                    silence.handle_heard(Instant::now());
                }
            }
            Look::GiveUp => {
                tracing::warn!(gateway = %gateway.id, after = ?config.dead_after,
                    "connections across a gateway are closed: it answers nothing");
                gateway.standing.given_up.send_modify(|times| *times += 1);
            }
        }
    }
}
