//! The operator API on its Unix socket: whoever may open the socket (0600) is an operator.

mod revocation;
mod socket;
mod status;
#[cfg(test)]
mod tests;

use std::time::Duration;

use jiff::Timestamp;
use tombolo_api::proto::operator::operator_server::{Operator, OperatorServer};
use tombolo_api::proto::operator::{
    ExportRequest, ExportResponse, InvitationRow, JoinAddRequest, JoinAddResponse, JoinListRequest, JoinListResponse,
    JoinRemoveRequest, JoinRemoveResponse, JoinRow, PeerAcceptRequest, PeerAcceptResponse, PeerInviteRequest,
    PeerInviteResponse, PeerListRequest, PeerListResponse, PeerRemoveRequest, PeerRemoveResponse, StatusRequest,
    StatusResponse, TrustAddRootRequest, TrustAddRootResponse, TrustRevokeRequest, TrustRevokeResponse,
    TrustUnrevokeRequest, TrustUnrevokeResponse, UnexportRequest, UnexportResponse,
};
use tombolo_core::id::{InvalidName, ServiceName, SpiffeId, TrustDomain};
use tombolo_core::invitation::{LIFE_DEFAULT, Token};
use tombolo_core::join::{JoinEntryId, JoinKind, JoinToken};
use tombolo_core::model::{Authority, ServiceSelector};
use tombolo_trust::ca::CertificateAuthority;
use tombolo_trust::peering::sha256;
use tonic::{Code, Request, Response, Status};

use crate::hub::HubHandle;
use crate::kubernetes::Lead;
use crate::peering::{Peering, PeeringError};
use crate::source::{ExportError, SourceHandle};
use crate::store::{Store, StoreError};
use data_encoding::HEXLOWER;
pub use socket::{OperatorSocket, SocketError};
pub use status::Surroundings;

/// Largest request; a token with its grants is far smaller.
const REQUEST_OCTETS_MAX: usize = 256 * 1024;
/// Selectors in one grant.
const SELECTORS_MAX: usize = 1_000;
/// How long a join entry lives unless said otherwise.
const JOIN_LIFE_DEFAULT: Duration = Duration::from_secs(24 * 60 * 60);
const JOIN_LIFE_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// All that an operator can reach.
pub struct OperatorService {
    pub trust_domain: TrustDomain,
    pub hub: HubHandle,
    pub store: Store,
    pub source: SourceHandle,
    pub peering: Peering,
    pub ca: CertificateAuthority,
    pub lead: Lead,
    pub surroundings: Surroundings,
}

impl OperatorService {
    /// The service for [`OperatorSocket::serve`].
    pub fn server(self) -> OperatorServer<Self> {
        OperatorServer::new(self).max_decoding_message_size(REQUEST_OCTETS_MAX)
    }

    /// Whoever does not lead changes nothing.
    fn leads(&self) -> Result<(), Status> {
        self.lead.check().map_err(|refused| Status::failed_precondition(refused.to_string()))
    }

    fn join_id(&self, request: &JoinAddRequest) -> Result<(JoinKind, SpiffeId), Status> {
        let domain = &self.trust_domain;
        if !request.role.is_empty() {
            let role = argument("role", &request.role)?;
            return Ok((JoinKind::Role, SpiffeId::role(domain, role, &argument("instance", &request.instance)?)));
        }
        let parts: Vec<&str> = request.workload.split('/').collect();
        let ["ns", namespace, "sa", account] = parts.as_slice() else {
            return Err(Status::invalid_argument("write the workload as ns/<namespace>/sa/<service account>"));
        };
        let id = SpiffeId::workload(domain, &argument("namespace", namespace)?, account);
        Ok((JoinKind::Workload, id.map_err(|error| Status::invalid_argument(format!("service account: {error}")))?))
    }
}

#[tonic::async_trait]
impl Operator for OperatorService {
    async fn peer_invite(&self, request: Request<PeerInviteRequest>) -> Result<Response<PeerInviteResponse>, Status> {
        self.leads()?;
        let PeerInviteRequest { life_s, exports, imports, addresses } = request.into_inner();
        let life = if life_s == 0 { LIFE_DEFAULT } else { Duration::from_secs(life_s.into()) };
        let token =
            self.peering.invite(life, authority(&exports, &imports)?, addresses).await.map_err(of_peering)?.token;
        Ok(Response::new(PeerInviteResponse {
            token: token.to_string(),
            invitation_id: token.id.to_string(),
            expires_unix_ms: token.expires.as_millisecond(),
            addresses: token.addresses.clone(),
        }))
    }

    async fn peer_accept(&self, request: Request<PeerAcceptRequest>) -> Result<Response<PeerAcceptResponse>, Status> {
        self.leads()?;
        let PeerAcceptRequest { token, exports, imports } = request.into_inner();
        let token: Token = token.parse().map_err(|error| of_peering(PeeringError::Token(error)))?;
        let accepted = self.peering.accept(&token, authority(&exports, &imports)?).await.map_err(of_peering)?;
        Ok(Response::new(PeerAcceptResponse {
            cluster: accepted.cluster.to_string(),
            trust_domain: accepted.trust_domain.to_string(),
            root_sha256: HEXLOWER.encode(&accepted.root_sha256),
        }))
    }

    async fn peer_list(&self, _: Request<PeerListRequest>) -> Result<Response<PeerListResponse>, Status> {
        let now = Timestamp::now();
        let peering = self.store.peering();
        let row = |(id, invitation): (&_, &tombolo_core::invitation::Invitation)| InvitationRow {
            id: ToString::to_string(id),
            expires_unix_ms: invitation.expires.as_millisecond(),
            state: invitation.state(now),
        };
        let invitations = peering.invitations.iter().map(row).collect();
        Ok(Response::new(PeerListResponse { peers: status::peers(&self.hub.view()), invitations }))
    }

    async fn peer_remove(&self, request: Request<PeerRemoveRequest>) -> Result<Response<PeerRemoveResponse>, Status> {
        self.leads()?;
        let cluster = argument("cluster", &request.into_inner().cluster)?;
        self.peering.remove(cluster).await.map_err(of_peering)?;
        Ok(Response::new(PeerRemoveResponse {}))
    }

    async fn export(&self, request: Request<ExportRequest>) -> Result<Response<ExportResponse>, Status> {
        let service: ServiceName = argument("service", &request.into_inner().service)?;
        let exported = self.source.export(service).await.map_err(of_export)?;
        Ok(Response::new(ExportResponse { file: exported.file, already: exported.already }))
    }

    async fn unexport(&self, request: Request<UnexportRequest>) -> Result<Response<UnexportResponse>, Status> {
        let service: ServiceName = argument("service", &request.into_inner().service)?;
        let file = self.source.unexport(service).await.map_err(of_export)?;
        Ok(Response::new(UnexportResponse { file }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(status::status(&self.hub.view(), &self.ca, &self.lead, self.surroundings)))
    }

    async fn join_add(&self, request: Request<JoinAddRequest>) -> Result<Response<JoinAddResponse>, Status> {
        self.leads()?;
        let request = request.into_inner();
        let (kind, id) = self.join_id(&request)?;
        let life = match request.life_s {
            0 => JOIN_LIFE_DEFAULT,
            life_s => Duration::from_secs(life_s.into()).min(JOIN_LIFE_MAX),
        };
        let now = Timestamp::now();
        let expires = now.checked_add(life).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let token = JoinToken::new(JoinEntryId::from_random(rand::random()), rand::random());
        let (entry_id, secret_sha256) = (token.entry_id, sha256(token.expose_secret()));
        let (uses, name) = (request.uses.max(1), id.clone());
        let added = self.store.off_thread(move |store| {
            store.change_joins(|entries| entries.add(entry_id, kind, name, secret_sha256, uses, expires, now))
        });
        added.await.map_err(of_store)?.map_err(|error| Status::failed_precondition(error.to_string()))?;
        tracing::info!(entry = %entry_id, %id, uses, "added a join entry");
        Ok(Response::new(JoinAddResponse {
            entry_id: entry_id.to_string(),
            token: token.expose(),
            spiffe_id: id.to_string(),
            expires_unix_ms: expires.as_millisecond(),
        }))
    }

    async fn join_list(&self, _: Request<JoinListRequest>) -> Result<Response<JoinListResponse>, Status> {
        let row = |(id, entry): (&JoinEntryId, &tombolo_core::join::JoinEntry)| JoinRow {
            entry_id: id.to_string(),
            spiffe_id: entry.spiffe_id.to_string(),
            uses_left: entry.uses_left(),
            expires_unix_ms: entry.expires.as_millisecond(),
        };
        Ok(Response::new(JoinListResponse { entries: self.store.joins().list().map(row).collect() }))
    }

    async fn join_remove(&self, request: Request<JoinRemoveRequest>) -> Result<Response<JoinRemoveResponse>, Status> {
        self.leads()?;
        let entry_id: JoinEntryId = argument("join entry", &request.into_inner().entry_id)?;
        let removed = self.store.off_thread(move |store| store.change_joins(|entries| entries.remove(&entry_id)));
        if removed.await.map_err(of_store)? {
            tracing::info!(entry = %entry_id, "removed a join entry");
            return Ok(Response::new(JoinRemoveResponse {}));
        }
        Err(Status::not_found(format!("no join entry {entry_id}; see `tombolo join list`")))
    }

    async fn trust_revoke(
        &self,
        request: Request<TrustRevokeRequest>,
    ) -> Result<Response<TrustRevokeResponse>, Status> {
        self.leads()?;
        self.revoke(&request.into_inner().spiffe_id).await.map(Response::new)
    }

    async fn trust_unrevoke(
        &self,
        request: Request<TrustUnrevokeRequest>,
    ) -> Result<Response<TrustUnrevokeResponse>, Status> {
        self.leads()?;
        self.unrevoke(&request.into_inner().spiffe_id).await.map(Response::new)
    }

    async fn trust_add_root(&self, _: Request<TrustAddRootRequest>) -> Result<Response<TrustAddRootResponse>, Status> {
        self.leads()?;
        let ca = self.ca.clone();
        let added = self.store.off_thread(move |_| ca.add_root()).await;
        let root_sha256 = added.map_err(|error| Status::internal(error.to_string()))?;
        let bundle = self.ca.bundle();
        let bundle_sequence = bundle.sequence();
        tracing::info!(sequence = bundle_sequence, "added a root to the trust bundle");
        self.hub.own_bundle_changed(bundle).await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(TrustAddRootResponse { root_sha256: HEXLOWER.encode(&root_sha256), bundle_sequence }))
    }
}

/// Parses an argument, naming it when it does not parse.
fn argument<T: std::str::FromStr<Err = InvalidName>>(name: &str, text: &str) -> Result<T, Status> {
    text.parse().map_err(|error| Status::invalid_argument(format!("{name}: {error}")))
}

/// Grants as an operator names them: everything exported is offered unless said otherwise, and
/// nothing may be brought in.
fn authority(exports: &[String], imports: &[String]) -> Result<Authority, Status> {
    let selectors = |name: &str, texts: &[String]| -> Result<Vec<ServiceSelector>, Status> {
        if texts.len() > SELECTORS_MAX {
            return Err(Status::invalid_argument(format!("{name}: more than {SELECTORS_MAX} selectors")));
        }
        texts.iter().map(|text| argument(name, text)).collect()
    };
    let mut exports = selectors("exports", exports)?;
    if exports.is_empty() {
        exports.push(ServiceSelector::All);
    }
    Ok(Authority { exports, imports: selectors("imports", imports)?, unmeshed: false })
}

fn of_peering(error: PeeringError) -> Status {
    let code = match &error {
        PeeringError::Token(_) | PeeringError::Address(_) | PeeringError::Create(_) => Code::InvalidArgument,
        PeeringError::UnknownPeer(_) => Code::NotFound,
        PeeringError::Gone(_) => Code::Unavailable,
        PeeringError::Unreachable { .. } | PeeringError::Silent { .. } => Code::Aborted,
        PeeringError::RefusedThere { .. } => Code::PermissionDenied,
        PeeringError::Store(_) => Code::Internal,
        PeeringError::NoGateway
        | PeeringError::Command(_)
        | PeeringError::Expired(_)
        | PeeringError::OwnToken
        | PeeringError::NoAddress
        | PeeringError::NoAddressInToken
        | PeeringError::Refused(_)
        | PeeringError::WrongAnswer(_)
        | PeeringError::UnreadableAnswer
        | PeeringError::DeclaredPeer(_) => Code::FailedPrecondition,
    };
    Status::new(code, error.to_string())
}

fn of_export(error: ExportError) -> Status {
    let code = match &error {
        ExportError::NoService { .. } | ExportError::NotExported(_) => Code::NotFound,
        ExportError::ExternalName(_)
        | ExportError::SystemNamespace
        | ExportError::ByHand { .. }
        | ExportError::Kubernetes
        | ExportError::File(_) => Code::FailedPrecondition,
        ExportError::Stopping => Code::Unavailable,
    };
    Status::new(code, error.to_string())
}

fn of_store(error: StoreError) -> Status {
    match error {
        StoreError::NotLeading | StoreError::Overtaken { .. } => Status::unavailable(error.to_string()),
        error => Status::internal(error.to_string()),
    }
}
