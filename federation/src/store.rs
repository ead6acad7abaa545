//! What a federation keeps over restarts: peers, invitations, join entries, epoch, first-seen times.
