//! The operator API on its Unix socket.
