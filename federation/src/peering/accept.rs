//! Accepting an invitation: one of our gateways dials, we sign what it saw.

use std::time::Duration;

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use prost::Message;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tombolo_api::proto::peering::answer::Kind;
use tombolo_api::proto::peering::{AcceptedBody, Answer, Offer, OfferBody};
use tombolo_core::id::{ClusterId, GatewayId, TrustDomain};
use tombolo_core::invitation::{Refused, Token};
use tombolo_core::model::Authority;
use tombolo_trust::bundle::{Bundle, root_sha256};
use tombolo_trust::peering as proof;

use super::{EVENTS_MAX, MESSAGE_OCTETS_MAX, Peering, PeeringError, Shared, addresses_from_wire, printable};
use crate::hub::{CommandRefused, PeerRecord, PeeringCommand, PeeringEvent};

/// How long a gateway may take to dial, and how long the other side to answer.
const STEP_TIMEOUT: Duration = Duration::from_secs(15);

/// A peering that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    pub cluster: ClusterId,
    pub trust_domain: TrustDomain,
    pub root_sha256: [u8; 32],
}

/// What came back, with what it must have been signed for.
struct Answered {
    exporter: [u8; proof::EXPORTER_LEN],
    /// Encoded, as it was sent.
    offer: Vec<u8>,
    answer: Answer,
}

/// Removes the attempt from those that wait when it ends, however it ends.
struct Attempt<'a> {
    shared: &'a Shared,
    id: String,
    gateway: GatewayId,
    events: mpsc::Receiver<PeeringEvent>,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        self.shared.attempts().remove(&self.id);
    }
}

impl Peering {
    /// Redeems an invitation and binds the cluster that made it. Repeating it after a failure is safe.
    pub async fn accept(&self, token: &Token, authority: Authority) -> Result<Accepted, PeeringError> {
        if token.expires <= Timestamp::now() {
            return Err(PeeringError::Expired(token.expires));
        }
        if token.addresses.is_empty() {
            return Err(PeeringError::NoAddressInToken);
        }
        let bound = self.shared.store.peering().bindings();
        self.shared.check_binding(bound, &token.cluster, &token.trust_domain).map_err(|refused| match refused {
            Refused::OwnName => PeeringError::OwnToken,
            refused => PeeringError::Refused(refused),
        })?;
        let answered = self.ask_gateways(token).await?;
        let record = read_answer(token, authority, answered)?;
        let accepted = Accepted {
            cluster: record.cluster.clone(),
            trust_domain: record.trust_domain.clone(),
            root_sha256: token.root_sha256,
        };
        let (stored, shared) = (record.clone(), self.shared.clone());
        // Checked once more: another token may have been accepted meanwhile.
        let bound = self.shared.store.off_thread(move |store| {
            store.change_peering(|state| {
                shared.check_binding(state.bindings(), &stored.cluster, &stored.trust_domain)?;
                state.insert_peer(stored);
                Ok::<_, Refused>(())
            })
        });
        bound.await??;
        tracing::info!(cluster = %accepted.cluster, trust_domain = %accepted.trust_domain, "accepted an invitation");
        self.shared.relay.peer_added(record).await?;
        self.shared.bindings_changed.notify_one();
        Ok(accepted)
    }

    /// Tries our gateways in turn until one has carried the offer there.
    async fn ask_gateways(&self, token: &Token) -> Result<Answered, PeeringError> {
        let mut failed = PeeringError::NoGateway;
        for gateway in self.shared.relay.gateways().into_iter().filter(|gateway| gateway.connected) {
            match self.ask(gateway.gateway, token).await {
                Ok(answer) => return Ok(answer),
                // Nothing has reached the other side yet: another gateway may.
                Err(
                    error @ (PeeringError::Unreachable { .. } | PeeringError::Command(_) | PeeringError::Silent { .. }),
                ) => {
                    tracing::warn!(%error, "peering");
                    failed = error;
                }
                Err(error) => return Err(error),
            }
        }
        Err(failed)
    }

    async fn ask(&self, gateway: GatewayId, token: &Token) -> Result<Answered, PeeringError> {
        let mut attempt = self.attempt(gateway);
        let dial = PeeringCommand::Dial {
            attempt: attempt.id.clone(),
            addresses: token.addresses.clone(),
            root_sha256: token.root_sha256,
            cluster: token.cluster.clone(),
        };
        attempt.command(dial).await?;
        let exporter = match attempt.next(token).await? {
            PeeringEvent::Exporter { exporter, .. } => exporter,
            _ => return Err(PeeringError::UnreadableAnswer),
        };
        let exporter: [u8; proof::EXPORTER_LEN] = exporter.try_into().map_err(|_| PeeringError::UnreadableAnswer)?;
        let offer = self.offer(token, &exporter).encode_to_vec();
        attempt.command(PeeringCommand::Offer { attempt: attempt.id.clone(), offer: offer.clone() }).await?;
        match attempt.next(token).await? {
            PeeringEvent::Answer { answer, .. } if answer.len() <= MESSAGE_OCTETS_MAX => {
                let answer = Answer::decode(answer.as_slice()).map_err(|_| PeeringError::UnreadableAnswer)?;
                Ok(Answered { exporter, offer, answer })
            }
            _ => Err(PeeringError::UnreadableAnswer),
        }
    }

    fn attempt(&self, gateway: GatewayId) -> Attempt<'_> {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let id = HEXLOWER.encode(&rand::random::<[u8; 16]>());
        self.shared.attempts().insert(id.clone(), sender);
        Attempt { shared: &self.shared, id, gateway, events }
    }

    fn offer(&self, token: &Token, exporter: &[u8; proof::EXPORTER_LEN]) -> Offer {
        let body = OfferBody {
            cluster: self.shared.cluster.to_string(),
            trust_domain: self.shared.trust_domain.to_string(),
            bundle: Some(self.shared.ca.bundle().to_wire()),
            gateways: self.shared.addresses_to_wire(),
            inviter_root_sha256: token.root_sha256.to_vec(),
        };
        let body = body.encode_to_vec();
        let proof = proof::sign(token.seed.expose(), exporter, &body).to_vec();
        Offer { invitation_id: token.id.to_string(), body, proof }
    }
}

/// Believes of the answer only what the root that the token pins has signed.
fn read_answer(token: &Token, authority: Authority, answered: Answered) -> Result<PeerRecord, PeeringError> {
    let Answered { exporter, offer, answer } = answered;
    let accepted = match answer.kind {
        Some(Kind::Accepted(accepted)) => accepted,
        Some(Kind::Refused(refused)) => {
            let (code, message) = (printable(&refused.code), printable(&refused.message));
            return Err(PeeringError::RefusedThere { cluster: token.cluster.clone(), code, message });
        }
        None => return Err(PeeringError::UnreadableAnswer),
    };
    let body = AcceptedBody::decode(accepted.body.as_slice()).map_err(|_| PeeringError::UnreadableAnswer)?;
    if body.cluster != token.cluster.as_str() {
        return Err(PeeringError::WrongAnswer("another cluster id"));
    }
    if body.trust_domain != token.trust_domain.as_str() {
        return Err(PeeringError::WrongAnswer("another trust domain"));
    }
    let bundle = body.bundle.ok_or(PeeringError::UnreadableAnswer)?;
    let bundle = Bundle::from_wire(bundle).map_err(|_| PeeringError::WrongAnswer("its bundle is not one"))?;
    if *bundle.trust_domain() != token.trust_domain {
        return Err(PeeringError::WrongAnswer("a bundle of another trust domain"));
    }
    let pinned = bundle.roots().iter().find(|root| root_sha256(root) == token.root_sha256);
    let pinned = pinned.ok_or(PeeringError::WrongAnswer("another root"))?;
    proof::verify_answer(pinned, &exporter, &offer, &accepted.body, &accepted.signature)
        .map_err(|_| PeeringError::WrongAnswer("the pinned root has not signed it"))?;
    let gateways = addresses_from_wire(body.gateways).ok_or(PeeringError::UnreadableAnswer)?;
    Ok(PeerRecord {
        cluster: token.cluster.clone(),
        trust_domain: token.trust_domain.clone(),
        authority,
        bundle: bundle.to_wire(),
        gateways,
    })
}

impl Attempt<'_> {
    async fn command(&self, command: PeeringCommand) -> Result<(), CommandRefused> {
        self.shared.relay.command(self.gateway.clone(), command).await
    }

    async fn next(&mut self, token: &Token) -> Result<PeeringEvent, PeeringError> {
        let silent = || PeeringError::Silent { gateway: self.gateway.clone(), after: STEP_TIMEOUT };
        let event = timeout(STEP_TIMEOUT, self.events.recv()).await.map_err(|_| silent())?.ok_or_else(silent)?;
        match event {
            PeeringEvent::Failed { reason, .. } => Err(PeeringError::Unreachable {
                gateway: self.gateway.clone(),
                cluster: token.cluster.clone(),
                reason: printable(&reason),
                addresses: token.addresses.join(", "),
            }),
            event => Ok(event),
        }
    }
}
