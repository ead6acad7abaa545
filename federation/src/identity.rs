//! The identity server: SVIDs from join entries and by renewal.
