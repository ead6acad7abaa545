//! Files that are either the old or the new content, whenever the power goes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Writes `bytes` to `path` with mode 0600: a temporary file beside it, fsync, rename, fsync of the folder.
///
/// # Errors
/// Those of the file system; `path` then still has its old content. A `path` without a file name is refused.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write(path, bytes, 0o600)
}

/// As [`write_private`], but readable by everybody (0644): for what is public anyway, such as a trust bundle.
pub fn write_public(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write(path, bytes, 0o644)
}

/// Makes `path` and its parents, each new folder with mode 0700. A folder that exists is left as it is, but for
/// the temporary files of a process that was killed while it wrote here.
pub fn create_private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(is_temporary) {
            // Another process that starts in the same folder may have been faster.
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// Whether [`write()`] or an announcement in progress has such a name: `.<name>.<16 letters and digits>.tmp`.
fn is_temporary(name: &str) -> bool {
    let Some((head, random)) = name.strip_suffix(".tmp").and_then(|rest| rest.rsplit_once('.')) else { return false };
    head.starts_with('.') && random.len() == 16 && random.bytes().all(|digit| digit.is_ascii_alphanumeric())
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let no_name = || io::Error::new(io::ErrorKind::InvalidInput, "the path names no file");
    let name = path.file_name().ok_or_else(no_name)?;
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // The name is unique, so that two writers never write into one temporary file.
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{:016x}.tmp", rand::random::<u64>()));
    let temporary = folder.join(temporary);

    let written = write_and_rename(&temporary, path, bytes, mode);
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written?;
    File::open(folder)?.sync_all()
}

fn write_and_rename(temporary: &Path, path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(temporary, path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn content_is_replaced_whole_and_stays_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pem");
        write_private(&path, b"one").unwrap();
        write_private(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn what_a_killed_writer_left_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("a/b");
        create_private_dir(&state).unwrap();
        assert_eq!(fs::metadata(&state).unwrap().permissions().mode() & 0o777, 0o700);
        for name in ["key.pem", ".key.pem.0123456789abcdef.tmp", ".hidden.tmp", "x.0123456789abcdef.tmp"] {
            fs::write(state.join(name), "x").unwrap();
        }
        create_private_dir(&state).unwrap();
        let mut left: Vec<_> = fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".hidden.tmp", "key.pem", "x.0123456789abcdef.tmp"]);
    }

    #[test]
    fn a_failed_write_leaves_the_old_content_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        fs::create_dir(&path).unwrap();
        assert!(write_private(&path, b"x").is_err(), "a folder is not replaced by a file");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write_private(Path::new("/"), b"x").is_err());
    }
}
