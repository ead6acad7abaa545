//! Peering: invitations, their redemption over the gateways, removal.
