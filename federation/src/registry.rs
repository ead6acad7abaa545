//! What the sidecars of this cluster have registered, and what becomes of it in the catalogue.
