//! Discovery: what this federation tells its own sidecars and gateways.
