//! Peers and invitations: one file, since redeeming an invitation changes both at once.

use std::collections::{BTreeMap, BTreeSet};

use data_encoding::BASE64;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tombolo_api::proto::catalog::TrustBundle;
use tombolo_core::id::{ClusterId, TrustDomain};
use tombolo_core::invitation::Invitations;
use tombolo_core::model::{Authority, GatewayAddress};

use crate::hub::PeerRecord;

/// Who is peered, and who may become so.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeeringState {
    peers: BTreeMap<ClusterId, StoredPeer>,
    #[serde(default)]
    pub invitations: Invitations,
    /// Peers that a resource of the source declares; kept so that their imports outlive a restart.
    #[serde(default)]
    declared: BTreeSet<ClusterId>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredPeer {
    trust_domain: TrustDomain,
    authority: Authority,
    bundle: StoredBundle,
    gateways: Vec<GatewayAddress>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredBundle {
    sequence: u64,
    refresh_hint_s: u32,
    #[serde(serialize_with = "to_base64", deserialize_with = "from_base64")]
    roots: Vec<Vec<u8>>,
}

fn to_base64<S: Serializer>(roots: &[Vec<u8>], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(roots.iter().map(|root| BASE64.encode(root)))
}

fn from_base64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<u8>>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    let decode = |text: String| BASE64.decode(text.as_bytes()).map_err(serde::de::Error::custom);
    texts.into_iter().map(decode).collect()
}

impl PeeringState {
    pub fn peers(&self) -> impl Iterator<Item = PeerRecord> {
        self.peers.iter().map(|(cluster, peer)| record(cluster, peer))
    }

    pub fn peer(&self, cluster: &ClusterId) -> Option<PeerRecord> {
        self.peers.get_key_value(cluster).map(|(cluster, peer)| record(cluster, peer))
    }

    /// Binds a peer, in place of what the same cluster had before.
    pub fn insert_peer(&mut self, peer: PeerRecord) {
        let PeerRecord { cluster, trust_domain, authority, bundle, gateways } = peer;
        let TrustBundle { sequence, roots_der: roots, refresh_hint_s, .. } = bundle;
        let bundle = StoredBundle { sequence, refresh_hint_s, roots };
        self.peers.insert(cluster, StoredPeer { trust_domain, authority, bundle, gateways });
    }

    /// Unbinds a peer; `false` when there was none. Its invitation brings it back no more.
    pub fn remove_peer(&mut self, cluster: &ClusterId) -> bool {
        self.invitations.peer_removed(cluster);
        self.peers.remove(cluster).is_some()
    }

    /// Which trust domain each peer is bound to.
    pub fn bindings(&self) -> BTreeMap<ClusterId, TrustDomain> {
        self.peers.iter().map(|(cluster, peer)| (cluster.clone(), peer.trust_domain.clone())).collect()
    }

    /// Replaces the list of peers that the source declares.
    pub fn set_declared(&mut self, declared: BTreeSet<ClusterId>) {
        self.declared = declared;
    }

    /// Whether `cluster` is a peer, by an invitation or by a resource.
    pub(super) fn knows(&self, cluster: &ClusterId) -> bool {
        self.peers.contains_key(cluster) || self.declared.contains(cluster)
    }

    /// ClusterId and TrustDomain are bound one to one.
    pub(super) fn check(&self) -> Result<(), String> {
        let domains: BTreeSet<_> = self.peers.values().map(|peer| &peer.trust_domain).collect();
        if domains.len() == self.peers.len() { Ok(()) } else { Err("two peers have one trust domain".into()) }
    }
}

fn record(cluster: &ClusterId, peer: &StoredPeer) -> PeerRecord {
    PeerRecord {
        cluster: cluster.clone(),
        trust_domain: peer.trust_domain.clone(),
        authority: peer.authority.clone(),
        bundle: TrustBundle {
            trust_domain: peer.trust_domain.to_string(),
            sequence: peer.bundle.sequence,
            roots_der: peer.bundle.roots.clone(),
            refresh_hint_s: peer.bundle.refresh_hint_s,
        },
        gateways: peer.gateways.clone(),
    }
}
