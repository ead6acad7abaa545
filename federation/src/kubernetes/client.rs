//! The connection to the API server.

use std::time::Duration;

use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};

use crate::config::KubernetesConfig;

const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);

/// Why there is no connection to the API server, before it was even tried.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("source.kubernetes names no kubeconfig, and this is no pod with a service account: {0}")]
    InCluster(#[from] InClusterError),
    #[error("source.kubernetes.kubeconfig can't be used: {0}")]
    Kubeconfig(#[from] KubeconfigError),
    #[error("the API server's client can't be made: {}", reason(.0))]
    Client(#[from] kube::Error),
}

/// The client of a federation, and how its API server is called in messages.
pub async fn connect(config: &KubernetesConfig) -> Result<(Client, String), ClientError> {
    let mut used = match &config.kubeconfig {
        None => Config::incluster()?,
        Some(file) => {
            let options = KubeConfigOptions { context: config.context.clone(), ..KubeConfigOptions::default() };
            Config::from_custom_kubeconfig(Kubeconfig::read_from(file)?, &options).await?
        }
    };
    used.connect_timeout = Some(CONNECT_TIME_MAX);
    let server = used.cluster_url.to_string();
    Ok((Client::try_from(used)?, server.trim_end_matches('/').to_owned()))
}

/// A client's error in words for an operator.
pub fn reason(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.code == 403 => {
            format!("{}; compare its rights with deploy/kubernetes/rbac.yaml", status.message)
        }
        kube::Error::Api(status) => format!("{} {}", status.code, status.message),
        other => {
            // The innermost cause says what happened; what is around it only that something did.
            let mut cause: &dyn std::error::Error = other;
            while let Some(inner) = cause.source() {
                cause = inner;
            }
            cause.to_string()
        }
    }
}
