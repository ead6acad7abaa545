//! The operator's socket: private from the moment it can be connected to, and never taken from a
//! process that still answers.

use std::fs::{self, Permissions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tombolo_api::proto::operator::operator_server::OperatorServer;
use tonic::transport::Server;

use super::OperatorService;

/// Name of the socket in the state directory.
pub const SOCKET: &str = "operator.sock";
/// Longest path of a Unix socket (`sun_path`), with its final zero.
const PATH_OCTETS_MAX: usize = 108;
/// Requests of one connection that are served at a time.
const REQUESTS_MAX: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("{path} is too long for a Unix socket ({PATH_OCTETS_MAX} octets); use a shorter state directory", path = .0.display())]
    TooLong(PathBuf),
    #[error("another process serves {path}; stop it, or use another state directory", path = .0.display())]
    InUse(PathBuf),
    #[error("{path} exists and is not a socket; move it away", path = .0.display())]
    NotASocket(PathBuf),
    #[error("{path}: {error}", path = .0.display(), error = .1)]
    Io(PathBuf, io::Error),
}

/// A bound socket; its file is removed when it is dropped.
#[derive(Debug)]
pub struct OperatorSocket {
    path: PathBuf,
    /// Tells our file from one that another process has put in its place.
    inode: u64,
    listener: Option<UnixListener>,
}

impl OperatorSocket {
    /// Binds `operator.sock` in the state directory. What a dead process left is replaced.
    pub fn bind(state: &Path) -> Result<Self, SocketError> {
        let path = state.join(SOCKET);
        // Bound under another name and renamed, so that nobody can connect before the mode is right.
        let staged = state.join(format!(".{SOCKET}.new"));
        if staged.as_os_str().len() >= PATH_OCTETS_MAX {
            return Err(SocketError::TooLong(path));
        }
        refuse_live(&path)?;
        let failed = |error| SocketError::Io(path.clone(), error);
        match fs::remove_file(&staged) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&staged).map_err(failed)?;
        fs::set_permissions(&staged, Permissions::from_mode(0o600)).map_err(failed)?;
        let inode = fs::symlink_metadata(&staged).map_err(failed)?.ino();
        fs::rename(&staged, &path).map_err(failed)?;
        Ok(Self { path, inode, listener: Some(listener) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves until `stop`; requests under way are answered first.
    pub async fn serve(
        mut self,
        service: OperatorServer<OperatorService>,
        stop: impl Future<Output = ()> + Send,
    ) -> Result<(), tonic::transport::Error> {
        let listener = self.listener.take().expect("a socket is served once");
        let server = Server::builder().concurrency_limit_per_connection(REQUESTS_MAX).add_service(service);
        server.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop).await
    }
}

impl Drop for OperatorSocket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn refuse_live(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(SocketError::Io(path.into(), error)),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(SocketError::NotASocket(path.into())),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::InUse(path.into())),
        Err(_) => Ok(()),
    }
}
