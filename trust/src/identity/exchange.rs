//! One exchange with the identity server.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::time::timeout;
use tombolo_api::proto::identity::identity_client::IdentityClient;
use tombolo_api::proto::identity::issue_request::Proof;
use tombolo_api::proto::identity::{IssueRequest, IssueResponse, JoinProof, RenewProof, TokenProof};
use tombolo_core::id::TrustDomain;
use tombolo_core::join::{JoinToken, NotAJoinToken};
use tombolo_core::refusal::Refusal;
use tombolo_core::service_account::Asked;
use tonic::transport::Channel;
use tonic::{Code, Status};
use zeroize::Zeroizing;

use super::FirstProof;
use crate::bundle::{Bundle, InvalidBundle};
use crate::grpc::{self, InvalidAddress};
use crate::key::{IdentityKey, KeyError};
use crate::svid::{InvalidSvid, Svid};

/// How long one exchange may take, connecting included.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest file with a token that is read, in octets.
const TOKEN_LEN_MAX: u64 = 16 * 1024;

#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    #[error(
        "no SVID is kept and no token is configured; set `join` to a file with a join token, or in a pod `token` to the \
         file of a projected service-account token"
    )]
    NoToken,
    #[error("can't read the token in {path}: {source}")]
    TokenFile { path: String, source: io::Error },
    #[error(transparent)]
    Token(#[from] NotAJoinToken),
    #[error("the federation did not answer in time; check the address and that it runs")]
    Timeout,
    #[error("the federation's certificate is refused: {refusal}; check that the CA file is the one of this federation")]
    Server { refusal: Refusal },
    #[error("the federation can't be reached: {0}")]
    Unreachable(String),
    #[error("the federation refuses: {message} ({code:?})")]
    Refused { code: Code, message: String },
    #[error("the federation answered for trust domain {0}, which is not the one of the CA file")]
    OtherDomain(TrustDomain),
    #[error("the answer is not usable: {0}")]
    Svid(#[from] InvalidSvid),
    #[error("the answer's bundle is not usable: {0}")]
    Bundle(#[from] InvalidBundle),
    #[error("the answer has no bundle")]
    NoBundle,
    #[error(transparent)]
    Key(#[from] KeyError),
}

pub(super) struct Exchange {
    client: IdentityClient<Channel>,
    key: IdentityKey,
    asked: Asked,
}

impl Exchange {
    pub(super) fn new(
        federation: &str,
        tls: Arc<ClientConfig>,
        key: IdentityKey,
        asked: Asked,
    ) -> Result<Self, InvalidAddress> {
        Ok(Self { client: IdentityClient::new(grpc::connect(federation, tls)?), key, asked })
    }

    pub(super) fn private_key(&self) -> PrivateKeyDer<'static> {
        self.key.private_key_der()
    }

    /// Renews by `latest`; where that is absent or refused for good, begins with the first proof.
    pub(super) async fn run(
        &mut self,
        latest: Option<&Svid>,
        first_proof: Option<&FirstProof>,
    ) -> Result<(Vec<CertificateDer<'static>>, Bundle), ExchangeError> {
        let Some(latest) = latest else { return self.begin(first_proof).await };
        let renewed = self.issue(Proof::Renew(renewal(latest))).await;
        match renewed {
            // The grace is over, or the federation has lost its CA: the token may still do.
            Err(ExchangeError::Refused { code: Code::PermissionDenied, .. }) if first_proof.is_some() => {
                // The reason why renewal was refused says more than that the token is used up.
                self.begin(first_proof).await.or(renewed)
            }
            renewed => renewed,
        }
    }

    /// The SVID of the role `unmeshed` for a gateway that has `own`.
    pub(super) async fn unmeshed(
        &mut self,
        own: &Svid,
    ) -> Result<(Vec<CertificateDer<'static>>, Bundle), ExchangeError> {
        self.issue(Proof::Unmeshed(renewal(own))).await
    }

    async fn begin(
        &mut self,
        first_proof: Option<&FirstProof>,
    ) -> Result<(Vec<CertificateDer<'static>>, Bundle), ExchangeError> {
        let proof = match first_proof.ok_or(ExchangeError::NoToken)? {
            FirstProof::Join(file) => {
                let token: JoinToken = read_token(file)?.parse()?;
                Proof::Join(JoinProof { entry_id: token.entry_id.to_string(), secret: token.expose_secret().to_vec() })
            }
            FirstProof::ServiceAccount(file) => {
                let token = read_token(file)?.trim().to_owned();
                let role = match self.asked {
                    Asked::Workload => String::new(),
                    Asked::Role(role) => role.to_string(),
                };
                Proof::Token(TokenProof { token, role })
            }
        };
        self.issue(proof).await
    }

    async fn issue(&mut self, proof: Proof) -> Result<(Vec<CertificateDer<'static>>, Bundle), ExchangeError> {
        let request = IssueRequest { csr_der: self.key.csr_der()?, proof: Some(proof) };
        let response: IssueResponse = match timeout(EXCHANGE_TIMEOUT, self.client.issue(request)).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return Err(failed(&status)),
            Err(_) => return Err(ExchangeError::Timeout),
        };
        let bundle = Bundle::from_wire(response.bundle.ok_or(ExchangeError::NoBundle)?)?;
        Ok((response.chain_der.into_iter().map(CertificateDer::from).collect(), bundle))
    }
}

fn renewal(latest: &Svid) -> RenewProof {
    RenewProof { chain_der: latest.chain.iter().map(|certificate| certificate.to_vec()).collect() }
}

fn failed(status: &Status) -> ExchangeError {
    if let Some(refusal) = grpc::refusal_of_status(status) {
        return ExchangeError::Server { refusal };
    }
    match status.code() {
        Code::Unavailable => ExchangeError::Unreachable(grpc::cause_of_status(status)),
        code => ExchangeError::Refused { code, message: status.message().to_owned() },
    }
}

fn read_token(path: &Path) -> Result<Zeroizing<String>, ExchangeError> {
    let mut text = Zeroizing::new(String::new());
    let read = std::fs::File::open(path).and_then(|file| file.take(TOKEN_LEN_MAX).read_to_string(&mut text));
    match read {
        Ok(_) => Ok(text),
        Err(source) => Err(ExchangeError::TokenFile { path: path.display().to_string(), source }),
    }
}
