//! The files that `export` writes and `unexport` removes: one an export, marked, so that a file
//! written by hand is never touched.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tombolo_core::id::ServiceName;
use tombolo_trust::atomic;

/// Folder of the source directory that the files are in.
const FOLDER: &str = "exports";
const MARK: &str = "# Written by tombolo export; remove it with `tombolo unexport`.";

/// Why an export's file was not written or removed.
#[derive(Debug, thiserror::Error)]
pub enum ExportFileError {
    #[error("{file} exists and was not written by `tombolo export`, or was changed since; move or remove it by hand", file = .0.display())]
    NotOurs(PathBuf),
    #[error("{file}: {error}; check that the source directory can be written", file = .0.display(), error = .1)]
    Io(PathBuf, io::Error),
}

/// The file of an export, relative to the source directory.
pub fn file_of(service: &ServiceName) -> PathBuf {
    Path::new(FOLDER).join(format!("{}.{}.yaml", service.namespace(), service.name()))
}

fn content_of(service: &ServiceName) -> String {
    let (namespace, name) = (service.namespace(), service.name());
    format!(
        "{MARK}\napiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata:\n  name: \"{name}\"\n  namespace: \"{namespace}\"\n"
    )
}

/// Whether the file there is one that `write` made, and not changed since.
fn is_ours(path: &Path, service: &ServiceName) -> io::Result<Option<bool>> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
        Ok(metadata) if !metadata.is_file() || metadata.len() > 4096 => Ok(Some(false)),
        Ok(_) => Ok(Some(fs::read(path)? == content_of(service).as_bytes())),
    }
}

/// Writes the export's file whole and durably.
pub fn write(directory: &Path, service: &ServiceName) -> Result<(), ExportFileError> {
    let path = directory.join(file_of(service));
    let failed = |error| ExportFileError::Io(path.clone(), error);
    match is_ours(&path, service).map_err(failed)? {
        Some(false) => return Err(ExportFileError::NotOurs(path)),
        Some(true) => return Ok(()),
        None => {}
    }
    fs::create_dir_all(directory.join(FOLDER)).map_err(failed)?;
    atomic::write_public(&path, content_of(service).as_bytes()).map_err(failed)
}

/// Removes the export's file, durably. `false` when there was none.
pub fn remove(directory: &Path, service: &ServiceName) -> Result<bool, ExportFileError> {
    let path = directory.join(file_of(service));
    let failed = |error| ExportFileError::Io(path.clone(), error);
    match is_ours(&path, service).map_err(failed)? {
        Some(false) => return Err(ExportFileError::NotOurs(path)),
        None => return Ok(false),
        Some(true) => {}
    }
    fs::remove_file(&path).map_err(failed)?;
    File::open(directory.join(FOLDER)).and_then(|folder| folder.sync_all()).map_err(failed)?;
    Ok(true)
}
