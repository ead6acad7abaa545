//! The sidecar: everything an application says to other services, and everything said to it, passes here.
//!
//! `outbound` takes the application's calls, picks an endpoint and carries them over an inner leg.

pub mod config;
pub mod outbound;

pub use config::Config;
