//! A Terraform provider that serves the schema beside its executable (`schema.json`, in the shape of `terraform providers
//! schema -json`) and refuses values that the cloud's API does not know (`enums.json`). With it `terraform init`,
//! `validate`, and `test` with mock providers check modules against real schemas without any cloud. It plans and
//! applies nothing: such calls are answered UNIMPLEMENTED.

mod schema;
mod values;

use std::os::unix::process::parent_id;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::proto::diagnostic::Severity;
use crate::proto::provider_server::{Provider, ProviderServer};
use crate::proto::{
    Diagnostic, get_provider_schema, stop_provider, validate_provider_config, validate_resource_config,
};
use crate::values::Rules;

// The messages that only hold others are never made.
#[allow(clippy::all, dead_code, unused_qualifications)]
mod proto {
    tonic::include_proto!("tfplugin6");
}
#[allow(clippy::all, unused_qualifications)]
mod controller {
    tonic::include_proto!("plugin");
}

/// How soon this process notices that the Terraform that started it was killed.
const PARENT_CHECK_INTERVAL: Duration = Duration::from_secs(1);

struct SchemaOnly {
    schemas: get_provider_schema::Response,
    rules: Rules,
}

#[tonic::async_trait]
impl Provider for SchemaOnly {
    async fn get_provider_schema(
        &self,
        _: Request<get_provider_schema::Request>,
    ) -> Result<Response<get_provider_schema::Response>, Status> {
        Ok(Response::new(self.schemas.clone()))
    }

    async fn validate_provider_config(
        &self,
        _: Request<validate_provider_config::Request>,
    ) -> Result<Response<validate_provider_config::Response>, Status> {
        Ok(Response::new(validate_provider_config::Response { diagnostics: Vec::new() }))
    }

    async fn validate_resource_config(
        &self,
        request: Request<validate_resource_config::Request>,
    ) -> Result<Response<validate_resource_config::Response>, Status> {
        let request = request.into_inner();
        let config = request.config.map(|value| value.msgpack).unwrap_or_default();
        let refused = self.rules.refused(&request.type_name, &config).map_err(|error| {
            Status::invalid_argument(format!("{}: configuration that is no MessagePack: {error:#}", request.type_name))
        })?;
        let diagnostics = refused
            .into_iter()
            .map(|detail| Diagnostic {
                severity: Severity::Error.into(),
                summary: "Value that the provider refuses".into(),
                detail,
            })
            .collect();
        Ok(Response::new(validate_resource_config::Response { diagnostics }))
    }

    async fn stop_provider(
        &self,
        _: Request<stop_provider::Request>,
    ) -> Result<Response<stop_provider::Response>, Status> {
        Ok(Response::new(stop_provider::Response::default()))
    }
}

/// Ends the process when Terraform asks for it.
struct Shutdown(Arc<Notify>);

#[tonic::async_trait]
impl controller::grpc_controller_server::GrpcController for Shutdown {
    async fn shutdown(&self, _: Request<controller::Empty>) -> Result<Response<controller::Empty>, Status> {
        self.0.notify_one();
        Ok(Response::new(controller::Empty {}))
    }
}

async fn until_orphaned(parent: u32) {
    while parent_id() == parent {
        tokio::time::sleep(PARENT_CHECK_INTERVAL).await;
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let parent = parent_id();
    ensure!(
        std::env::var_os("TF_PLUGIN_MAGIC_COOKIE").is_some(),
        "this is a plugin of Terraform's, started by it; terraform/README.md says how the modules are tested"
    );
    ensure!(
        std::env::var_os("PLUGIN_CLIENT_CERT").is_none(),
        "Terraform asks for TLS to its plugins, which this one does not speak: set TF_DISABLE_PLUGIN_TLS=1"
    );
    let executable = std::env::current_exe()?;
    let beside = executable.parent().context("an executable has a folder")?;
    let read = |name: &str| {
        let path = beside.join(name);
        std::fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))
    };
    let schemas = schema::read(&read("schema.json")?).context("schema.json")?;
    let rules = Rules::new(&read("enums.json")?, schema::computed_only(&schemas)).context("enums.json")?;
    let provider = SchemaOnly { schemas, rules };
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    // go-plugin's handshake: versions of its own protocol and of Terraform's, and where to connect.
    println!("1|6|tcp|{}|grpc", listener.local_addr()?);
    let ended = Arc::new(Notify::new());
    let shutdown = controller::grpc_controller_server::GrpcControllerServer::new(Shutdown(ended.clone()));
    let end = async move {
        tokio::select! {
            () = ended.notified() => {}
            () = until_orphaned(parent) => std::process::exit(1),
        }
    };
    Server::builder()
        .add_service(ProviderServer::new(provider))
        .add_service(shutdown)
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), end)
        .await?;
    Ok(())
}
