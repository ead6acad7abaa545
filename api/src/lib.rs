//! Contracts: what tombolo's processes say to each other (protobuf) and what operators write
//! (Kubernetes-shaped resources), with their conversions to `tombolo_core` types.
//!
//! Wire types stay at the edges: a shell decodes, converts with [`convert`] and hands core types on.

pub mod convert;
pub mod frame;
pub mod inject;
pub mod k8s;
pub mod policy;

/// Generated code; names and comments are those of the `.proto` files beside this crate.
pub mod proto {
    // Generated modules refer to each other as `super::super::<name>::v1`, hence the nesting.
    mod packages {
        macro_rules! package {
            ($name:ident, $package:literal) => {
                pub mod $name {
                    #[allow(clippy::all, clippy::pedantic, unused_qualifications, rustdoc::all)]
                    pub mod v1 {
                        tonic::include_proto!($package);
                    }
                }
            };
        }
        package!(catalog, "tombolo.catalog.v1");
        package!(discovery, "tombolo.discovery.v1");
        package!(gateway_watch, "tombolo.gateway_watch.v1");
        package!(identity, "tombolo.identity.v1");
        package!(opaque, "tombolo.opaque.v1");
        package!(operator, "tombolo.operator.v1");
        package!(peer, "tombolo.peer.v1");
        package!(peering, "tombolo.peering.v1");
        package!(replica, "tombolo.replica.v1");
        package!(tunnel, "tombolo.tunnel.v1");
    }

    pub use packages::catalog::v1 as catalog;
    pub use packages::discovery::v1 as discovery;
    pub use packages::gateway_watch::v1 as gateway_watch;
    pub use packages::identity::v1 as identity;
    pub use packages::opaque::v1 as opaque;
    pub use packages::operator::v1 as operator;
    pub use packages::peer::v1 as peer;
    pub use packages::peering::v1 as peering;
    pub use packages::replica::v1 as replica;
    pub use packages::tunnel::v1 as tunnel;
}
