//! The way to the federation: gRPC over the Unix socket in its state directory.

use std::future::Future;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tombolo_api::proto::operator::operator_client::OperatorClient;
use tonic::transport::{Channel, Endpoint};

pub type Operator = OperatorClient<Channel>;

/// Connects to the federation whose state is in `state`, or in its folder `federation`, as an agent has it.
pub async fn connect(state: &Path) -> anyhow::Result<Operator> {
    let [own, agents]: [PathBuf; 2] = ["operator.sock", "federation/operator.sock"].map(|path| state.join(path));
    let socket = if !own.exists() && agents.exists() { agents } else { own };
    // Asking once here gives the operating system's reason, which the channel below would hide.
    UnixStream::connect(&socket).await.with_context(|| {
        format!(
            "no federation answers at {}: is `tombolo federation` running with this state directory? \
             Name another one with --state DIR or TOMBOLO_STATE",
            socket.display()
        )
    })?;
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://operator").connect_with_connector(connector).await?;
    Ok(OperatorClient::new(channel))
}

/// Runs one command's future to its end.
pub fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}

/// The federation's own words for a refusal; they name the cause and the next step.
pub fn refused(status: tonic::Status) -> anyhow::Error {
    match status.code() {
        tonic::Code::Unavailable => anyhow!("the federation went away while it was asked: {}", status.message()),
        _ => anyhow!("{}", status.message()),
    }
}
