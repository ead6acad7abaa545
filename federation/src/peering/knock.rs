//! Somebody dialled one of our gateways to redeem an invitation: judged here, where the public keys are.

use jiff::Timestamp;
use prost::Message;
use rustls::pki_types::{CertificateDer, UnixTime};
use tombolo_api::proto::peering::answer::Kind;
use tombolo_api::proto::peering::{Accepted, AcceptedBody, Answer, Offer, OfferBody, Refused as WireRefused};
use tombolo_core::id::{ClusterId, GatewayId, Role, TrustDomain};
use tombolo_core::invitation::{self, Bindings, InvitationId, Redemption, Refused};
use tombolo_core::model::GatewayAddress;
use tombolo_trust::bundle::{Bundle, root_sha256};
use tombolo_trust::peering as proof;
use tombolo_trust::store::Usage;

use super::{MESSAGE_OCTETS_MAX, Peering, Shared, addresses_from_wire};
use crate::hub::{PeerRecord, PeeringCommand};
use crate::store::Store;

/// Certificates that a caller may present.
const CHAIN_MAX: usize = 8;

/// Why a knock is refused: a code for metrics, and words for the one who knocked.
struct No {
    code: &'static str,
    message: String,
}

impl From<Refused> for No {
    fn from(refused: Refused) -> Self {
        Self { code: refused.code(), message: refused.to_string() }
    }
}

fn no(code: &'static str, message: &str) -> No {
    No { code, message: message.into() }
}

/// What an offer claims, once its form is right.
struct Claims {
    cluster: ClusterId,
    trust_domain: TrustDomain,
    bundle: Bundle,
    gateways: Vec<GatewayAddress>,
    inviter_root_sha256: [u8; 32],
}

impl Peering {
    /// Judges a knock on a task of its own and sends the verdict.
    pub(super) fn knock(
        &self,
        gateway: GatewayId,
        attempt: String,
        exporter: Vec<u8>,
        offer: Vec<u8>,
        chain: Vec<Vec<u8>>,
    ) {
        let permit = self.shared.knocks.clone().try_acquire_owned();
        let peering = self.clone();
        // Without a permit too, a refusal is sent: it costs next to nothing.
        tokio::spawn(async move {
            let verdict = match &permit {
                Ok(_) => peering.judge(exporter, offer, chain).await,
                Err(_) => Err(no("busy", "too many peerings are being made at once; try again in a minute")),
            };
            let kind = match verdict {
                Ok(accepted) => Kind::Accepted(accepted),
                Err(No { code, message }) => {
                    (peering.shared.on_refused)(code);
                    tracing::warn!(%gateway, reason = code, "refused to peer");
                    Kind::Refused(WireRefused { code: code.into(), message })
                }
            };
            let answer = Answer { kind: Some(kind) }.encode_to_vec();
            // One whose gateway has gone tries again, and gets the same answer.
            if let Err(error) = peering.shared.relay.command(gateway, PeeringCommand::Verdict { attempt, answer }).await
            {
                tracing::warn!(%error, "the answer to a peering was not sent");
            }
        });
    }

    async fn judge(&self, exporter: Vec<u8>, offer: Vec<u8>, chain: Vec<Vec<u8>>) -> Result<Accepted, No> {
        if offer.len() > MESSAGE_OCTETS_MAX {
            return Err(no("bad-offer", "the offer is larger than 64 KiB"));
        }
        let read = Offer::decode(offer.as_slice()).map_err(|_| no("bad-offer", "the offer can't be read"))?;
        let (shared, of) = (self.shared.clone(), exporter.clone());
        let decided = self.shared.store.off_thread(move |store| decide(&shared, store, &of, &read, &chain));
        let Redeemed { record, pinned } = decided.await?;
        // Trusted here before the other side hears of it, since it dials at once.
        if let Some(record) = record {
            tracing::info!(cluster = %record.cluster, trust_domain = %record.trust_domain, "an invitation was redeemed");
            let gone = |_| no("busy", "the inviting federation is stopping; try again");
            self.shared.relay.peer_added(record).await.map_err(gone)?;
            self.shared.bindings_changed.notify_one();
        }
        self.answer(pinned, &exporter, &offer)
    }

    /// Signed with the root that the token pins, so that no gateway on the way can add to it.
    fn answer(&self, pinned: [u8; 32], exporter: &[u8], offer: &[u8]) -> Result<Accepted, No> {
        let body = AcceptedBody {
            cluster: self.shared.cluster.to_string(),
            trust_domain: self.shared.trust_domain.to_string(),
            bundle: Some(self.shared.ca.bundle().to_wire()),
            gateways: self.shared.addresses_to_wire(),
        };
        let body = body.encode_to_vec();
        let exporter = exporter.try_into().map_err(|_| no("bad-offer", "the exporter value has another length"))?;
        let signature = self.shared.ca.sign_answer(pinned, exporter, offer, &body).map_err(|error| {
            tracing::error!(%error, "the answer to a peering can't be signed");
            no("not-signed", "the inviting federation can't sign its answer; see its log, then try again")
        })?;
        Ok(Accepted { body, signature })
    }
}

/// An invitation that was redeemed with this offer, now or before.
struct Redeemed {
    /// The new peer, or nothing when the offer is a repeat.
    record: Option<PeerRecord>,
    /// SHA-256 of our root that the token pins.
    pinned: [u8; 32],
}

/// Decides and makes durable.
fn decide(shared: &Shared, store: &Store, exporter: &[u8], offer: &Offer, chain: &[Vec<u8>]) -> Result<Redeemed, No> {
    let id: InvitationId = offer.invitation_id.parse().map_err(|_| No::from(Refused::Unknown))?;
    let known = store.peering().invitations.get(&id).map(|invitation| invitation.public_key);
    let public_key = known.ok_or(Refused::Unknown)?;
    let proof_ok = proof::verify(&public_key, exporter, &offer.body, &offer.proof).is_ok();
    // The claims of an offer without proof are not looked at; the failed try is counted all the same.
    let claims = if proof_ok { Some(claims(shared, offer, chain)?) } else { None };
    let attempt = invitation::Attempt {
        id,
        proof_ok,
        root_sha256: claims.as_ref().map_or([0; 32], |claims| bundle_sha256(&claims.bundle)),
        cluster: claims.as_ref().map_or_else(|| shared.cluster.clone(), |claims| claims.cluster.clone()),
        trust_domain: claims.as_ref().map_or_else(|| shared.trust_domain.clone(), |claims| claims.trust_domain.clone()),
    };
    let pinned = claims.as_ref().map(|claims| claims.inviter_root_sha256);
    let redeemed = store.change_peering(|state| {
        let peers = shared.bindings(state.bindings());
        let bindings = Bindings { own_cluster: &shared.cluster, own_trust_domain: &shared.trust_domain, peers: &peers };
        let redemption = state.invitations.redeem(&attempt, &bindings, Timestamp::now())?;
        let (Redemption::Accept(authority), Some(claims)) = (redemption, claims) else { return Ok(None) };
        let record = PeerRecord {
            cluster: claims.cluster,
            trust_domain: claims.trust_domain,
            authority,
            bundle: claims.bundle.to_wire(),
            gateways: claims.gateways,
        };
        state.insert_peer(record.clone());
        Ok::<_, Refused>(Some(record))
    });
    let stored = redeemed.map_err(|error| {
        tracing::error!(%error, "a peering can't be made durable");
        no("not-durable", "the inviting federation can't write its state; see its log, then try again")
    })?;
    Ok(Redeemed { record: stored?, pinned: pinned.ok_or(Refused::BadProof)? })
}

/// One digest over all roots, so that a repeat must come with the very same ones.
fn bundle_sha256(bundle: &Bundle) -> [u8; 32] {
    bundle.version().digest
}

fn claims(shared: &Shared, offer: &Offer, chain: &[Vec<u8>]) -> Result<Claims, No> {
    let bad =
        |what: &str| no("bad-offer", &format!("the offer is not valid: {what}; use the same release on both sides"));
    let body = OfferBody::decode(offer.body.as_slice()).map_err(|_| bad("it can't be read"))?;
    let bundle =
        Bundle::from_wire(body.bundle.ok_or_else(|| bad("no bundle"))?).map_err(|error| bad(&error.to_string()))?;
    let claims = Claims {
        cluster: body.cluster.parse().map_err(|_| bad("its cluster id"))?,
        trust_domain: body.trust_domain.parse().map_err(|_| bad("its trust domain"))?,
        bundle,
        gateways: addresses_from_wire(body.gateways).ok_or_else(|| bad("its gateway addresses"))?,
        inviter_root_sha256: body.inviter_root_sha256.try_into().map_err(|_| bad("the root that it names"))?,
    };
    if *claims.bundle.trust_domain() != claims.trust_domain || claims.bundle.roots().is_empty() {
        return Err(bad("its bundle is not one of its trust domain"));
    }
    let own = shared.ca.bundle();
    if !own.roots().iter().any(|root| root_sha256(root) == claims.inviter_root_sha256) {
        return Err(no("wrong-root", "the token pins a root that this cluster does not publish; ask for a new token"));
    }
    check_caller(&claims, chain)?;
    Ok(claims)
}

/// Whoever dialled must be a gateway of the trust domain that the offer speaks for.
fn check_caller(claims: &Claims, chain: &[Vec<u8>]) -> Result<(), No> {
    let refused = |detail: &str| {
        no(
            "bad-certificate",
            &format!(
                "the dialling gateway's certificate does not fit the offer: {detail}; check the clocks of both machines"
            ),
        )
    };
    if chain.len() > CHAIN_MAX {
        return Err(refused("its chain is too long"));
    }
    let chain: Vec<CertificateDer<'_>> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let verified = claims.bundle.verify(&chain, Usage::Client, UnixTime::now());
    let id = verified.map_err(|why| refused(&why.to_string()))?;
    if id.as_role() == Some(Role::Gateway) { Ok(()) } else { Err(refused("it is not a gateway's")) }
}
