//! Which sidecars and gateways were connected, kept over a restart of the federation.
//!
//! Nothing is decided by it: without the file, everything comes back as soon as sidecars and gateways
//! have connected again, only with a gap.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tombolo_core::id::{GatewayId, SpiffeId};
use tombolo_trust::atomic;

use super::HubHandle;
use crate::registry::RememberedSidecar;

const FILE: &str = "connected.json";
/// Changes within this time are written together.
const WRITE_INTERVAL: Duration = Duration::from_millis(500);
/// Larger than ten thousand sidecars need.
const OCTETS_MAX: u64 = 64 * 1024 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Remembered {
    pub sidecars: Vec<RememberedSidecar>,
    pub gateways: Vec<RememberedGateway>,
}

/// A gateway as it introduced itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RememberedGateway {
    pub gateway: GatewayId,
    pub spiffe_id: SpiffeId,
    pub advertise: Vec<String>,
    pub ingress_address: String,
    pub watch_address: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unmeshed_address: Option<IpAddr>,
}

/// Reads what [`follow`] wrote below the state directory; nothing if there is none or it can't be read.
pub fn load(state: &Path) -> Remembered {
    let path = state.join(FILE);
    let read = || -> io::Result<Remembered> {
        if std::fs::metadata(&path)?.len() > OCTETS_MAX {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "too large"));
        }
        Ok(serde_json::from_slice(&std::fs::read(&path)?)?)
    };
    match read() {
        Ok(remembered) => remembered,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Remembered::default(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "what was connected before is not known");
            Remembered::default()
        }
    }
}

/// Writes what is connected whenever it has changed, until the hub ends.
pub async fn follow(hub: HubHandle, state: PathBuf) {
    let mut changes = hub.changes();
    let mut written = Arc::new(load(&state));
    let mut seen = written.clone();
    loop {
        changes.borrow_and_update();
        let now = hub.view().remembered.clone();
        if !Arc::ptr_eq(&now, &seen) && now != written {
            let (path, content) = (state.join(FILE), now.clone());
            let write = move || -> io::Result<()> { atomic::write_private(&path, &serde_json::to_vec(&*content)?) };
            match tokio::task::spawn_blocking(write).await {
                Ok(Ok(())) => written = now.clone(),
                Ok(Err(error)) => tracing::error!(%error, "what is connected can't be written"),
                Err(_) => return,
            }
            tokio::time::sleep(WRITE_INTERVAL).await;
        }
        seen = now;
        if changes.changed().await.is_err() {
            return;
        }
    }
}
