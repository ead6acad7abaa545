//! One exchange with the identity server.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::time::timeout;
use tombolo_api::proto::identity::identity_client::IdentityClient;
use tombolo_api::proto::identity::issue_request::Proof;
use tombolo_api::proto::identity::{IssueRequest, IssueResponse, JoinProof, RenewProof};
use tombolo_core::id::TrustDomain;
use tombolo_core::join::{JoinToken, NotAJoinToken};
use tombolo_core::refusal::Refusal;
use tonic::transport::Channel;
use tonic::{Code, Status};
use zeroize::Zeroizing;

use crate::bundle::{Bundle, InvalidBundle};
use crate::grpc::{self, InvalidAddress};
use crate::key::{IdentityKey, KeyError};
use crate::svid::{InvalidSvid, Svid};

/// How long one exchange may take, connecting included.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest join token file that is read, in octets.
const TOKEN_LEN_MAX: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    #[error("no SVID is kept and no join token is configured; set `join` to a file with one")]
    NoToken,
    #[error("can't read the join token: {0}")]
    TokenFile(io::Error),
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
}

impl Exchange {
    pub(super) fn new(federation: &str, tls: Arc<ClientConfig>, key: IdentityKey) -> Result<Self, InvalidAddress> {
        Ok(Self { client: IdentityClient::new(grpc::connect(federation, tls)?), key })
    }

    pub(super) fn private_key(&self) -> PrivateKeyDer<'static> {
        self.key.private_key_der()
    }

    /// Renews by `latest`; where that is absent or refused for good, joins with the token in the file `join`.
    pub(super) async fn run(
        &mut self,
        latest: Option<&Svid>,
        join: Option<&Path>,
    ) -> Result<(Vec<CertificateDer<'static>>, Bundle), ExchangeError> {
        let Some(latest) = latest else { return self.join(join).await };
        let chain_der = latest.chain.iter().map(|certificate| certificate.to_vec()).collect();
        let renewed = self.issue(Proof::Renew(RenewProof { chain_der })).await;
        match renewed {
            // The grace is over, or the federation has lost its CA: the token may still do.
            Err(ExchangeError::Refused { code: Code::PermissionDenied, .. }) if join.is_some() => {
                // The reason why renewal was refused says more than that the token is used up.
                self.join(join).await.or(renewed)
            }
            renewed => renewed,
        }
    }

    async fn join(&mut self, join: Option<&Path>) -> Result<(Vec<CertificateDer<'static>>, Bundle), ExchangeError> {
        let token = read_token(join.ok_or(ExchangeError::NoToken)?)?;
        let proof = JoinProof { entry_id: token.entry_id.to_string(), secret: token.expose_secret().to_vec() };
        self.issue(Proof::Join(proof)).await
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

fn failed(status: &Status) -> ExchangeError {
    if let Some(refusal) = grpc::refusal_of_status(status) {
        return ExchangeError::Server { refusal };
    }
    match status.code() {
        Code::Unavailable => ExchangeError::Unreachable(grpc::cause_of_status(status)),
        code => ExchangeError::Refused { code, message: status.message().to_owned() },
    }
}

fn read_token(path: &Path) -> Result<JoinToken, ExchangeError> {
    let bytes = Zeroizing::new(std::fs::read(path).map_err(ExchangeError::TokenFile)?);
    let bounded = bytes.get(..bytes.len().min(TOKEN_LEN_MAX)).unwrap_or_default();
    let text = std::str::from_utf8(bounded).map_err(|_| NotAJoinToken)?;
    Ok(text.parse()?)
}
