//! What becomes of one service that several clusters export differently (KEP-1645, "Conflict resolution").

use std::fmt;

use serde::Serialize;

/// On what the exports of a service disagree; printed as the KEP's condition reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Conflict {
    Port,
    Type,
    SessionAffinity,
}

impl Conflict {
    /// The reason of the `Conflict` condition.
    pub fn reason(self) -> &'static str {
        match self {
            Conflict::Port => "PortConflict",
            Conflict::Type => "TypeConflict",
            Conflict::SessionAffinity => "SessionAffinityConflict",
        }
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason())
    }
}
