//! Every decision tombolo takes, without I/O.
//!
//! Time and randomness are arguments. One-shot decisions are pure functions; lasting state is a
//! state machine driven by `handle_*`, `poll_event` and `poll_timeout`. The shells (the other
//! crates) perform what is decided here.

pub mod addresses;
pub mod authz;
pub mod backoff;
pub mod bundle;
pub mod capture;
pub mod catalog;
pub mod check;
pub mod conflict;
pub mod detect;
pub mod dns;
pub mod document;
pub mod door;
pub mod freshness;
pub mod health;
pub mod id;
pub mod import;
pub mod invitation;
pub mod join;
pub mod lease;
pub mod liveness;
pub mod mcs;
pub mod model;
pub mod outlier;
pub mod policy;
pub mod publish;
pub mod refusal;
pub mod registration;
pub mod resolution;
pub mod retry;
pub mod routing;
pub mod service_account;
pub mod silence;
pub mod sni;
pub mod source;
pub mod stall;
pub mod trace;
