//! What the sidecar does with redirected connections.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tombolo_runtime::config::Problem;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CaptureConfig {
    /// Port on loopback, in both families, where redirected outbound connections arrive.
    pub outbound: u16,
    /// Port where redirected inbound connections arrive.
    pub inbound: u16,
    pub plaintext: Plaintext,
    /// How long a connection to what could be a virtual address waits until all of them are known.
    #[serde(with = "humantime_serde")]
    pub addresses_wait: Duration,
}

/// What becomes of inbound connections that are no inner legs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Plaintext {
    /// Passed to the application at the port that they were going to, and counted.
    #[default]
    Permissive,
    /// Reset, and counted.
    Strict,
}

impl Default for CaptureConfig {
    fn default() -> Self {
        Self {
            outbound: super::OUTBOUND_PORT,
            inbound: super::INBOUND_PORT,
            plaintext: Plaintext::default(),
            addresses_wait: Duration::from_secs(2),
        }
    }
}

impl CaptureConfig {
    pub fn problems(&self, problems: &mut Vec<Problem>) {
        if self.outbound == self.inbound && self.outbound != 0 {
            problems.push(Problem::new(
                "capture.inbound",
                "outbound and inbound connections need a port of their own each",
            ));
        }
    }
}
