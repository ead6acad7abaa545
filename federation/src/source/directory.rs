//! Reads a directory of YAML files, keeping for each file the last content that was good.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tombolo_api::k8s;
use tombolo_core::id::ClusterId;
use tombolo_core::source::SourceProblem;
use tombolo_core::source::declared::{Declared, Object, Place};
use tombolo_trust::bundle::Bundle;

pub const FILES_MAX: usize = 2_000;
pub const FILE_OCTETS_MAX: u64 = 1024 * 1024;
pub const TOTAL_OCTETS_MAX: u64 = 32 * 1024 * 1024;
pub const DEPTH_MAX: usize = 16;
/// A file is taken to be empty on purpose when it has been so for this long: many programs empty a
/// file before they write it.
pub const EMPTY_AFTER: Duration = Duration::from_secs(1);
/// A file that changed this shortly before it was read is read again by the next scan, since a
/// later change may carry the same time stamp.
const SETTLED_AFTER: Duration = Duration::from_secs(2);

/// The directory as it was last read.
pub struct Directory {
    root: PathBuf,
    cluster: ClusterId,
    files: BTreeMap<PathBuf, KnownFile>,
}

/// All that one scan found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reading {
    pub objects: Vec<Declared>,
    pub problems: Vec<SourceProblem>,
    /// Scan again after this time even if nothing seems to have changed.
    pub again: Option<Duration>,
}

#[derive(Default)]
struct KnownFile {
    stamp: Option<Stamp>,
    settled: bool,
    emptied: Option<Instant>,
    objects: Vec<Declared>,
    /// What closes services as long as nothing of the file is in force: its AccessPolicies.
    closing: Vec<Declared>,
    problems: Vec<SourceProblem>,
}

/// What tells that a file was written or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    octets: u64,
    modified_ns: (i64, i64),
    changed_ns: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            octets: metadata.len(),
            modified_ns: (metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    fn is_settled(self, wall: SystemTime) -> bool {
        let changed = Duration::new(self.changed_ns.0.max(0).unsigned_abs(), self.changed_ns.1.unsigned_abs() as u32);
        let since = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        since.checked_sub(changed).is_some_and(|age| age > SETTLED_AFTER)
    }
}

impl Directory {
    pub fn new(root: PathBuf, cluster: ClusterId) -> Self {
        Self { root, cluster, files: BTreeMap::new() }
    }

    /// Reads what has changed. Whatever can't be read keeps its last good content, and is reported.
    pub fn scan(&mut self, now: Instant, wall: SystemTime) -> Reading {
        let walk = Walk::over(&self.root);
        let kept = |path: &Path| walk.unreadable.iter().any(|folder| path.starts_with(folder));
        self.files.retain(|path, _| walk.files.contains_key(path) || kept(path));
        let mut reading = Reading { problems: walk.problems, ..Reading::default() };
        let mut octets = 0_u64;
        for (path, metadata) in &walk.files {
            octets += metadata.len();
            let file = self.files.entry(path.clone()).or_default();
            if octets > TOTAL_OCTETS_MAX {
                let reason = "all files together are above 32 MiB; this one and later ones are not read";
                reading.problems.push(problem(path, 0, file.reported(reason)));
                break;
            }
            let stamp = Stamp::of(metadata);
            if file.stamp != Some(stamp) || !file.settled || file.emptied.is_some() {
                file.settled = stamp.is_settled(wall);
                file.stamp = Some(stamp);
                file.read(&self.root.join(path), path, &self.cluster, now);
            }
        }
        for file in self.files.values() {
            reading.objects.extend(file.objects.iter().chain(&file.closing).cloned());
            reading.problems.extend(file.problems.iter().cloned());
            let left = file.emptied.map(|at| (at + EMPTY_AFTER).saturating_duration_since(now));
            reading.again = [reading.again, left].into_iter().flatten().min();
        }
        reading
    }
}

impl KnownFile {
    fn read(&mut self, path: &Path, relative: &Path, cluster: &ClusterId, now: Instant) {
        let content = match content_of(path) {
            Ok(content) => content,
            Err(reason) => return self.refuse(relative, vec![(0, reason)]),
        };
        if content.trim().is_empty() && !self.objects.is_empty() {
            let emptied = *self.emptied.get_or_insert(now);
            if now.saturating_duration_since(emptied) < EMPTY_AFTER {
                return;
            }
        }
        match parse(&content, relative, cluster) {
            Ok(objects) => *self = Self { objects, stamp: self.stamp, settled: self.settled, ..Self::default() },
            Err(wrong) => {
                self.closing = if self.objects.is_empty() { closing(&content, relative, cluster) } else { Vec::new() };
                self.refuse(relative, wrong);
            }
        }
    }

    fn refuse(&mut self, relative: &Path, wrong: Vec<(u32, String)>) {
        self.emptied = None;
        let problems = wrong.into_iter().map(|(line, reason)| problem(relative, line, self.reported(&reason)));
        self.problems = problems.collect();
    }

    fn reported(&self, reason: &str) -> String {
        match (self.objects.is_empty(), self.closing.is_empty()) {
            (true, true) => reason.into(),
            (true, false) => {
                format!("{reason} (until it is mended, an AccessPolicy in it that can't be read refuses every caller)")
            }
            (false, _) => format!("{reason} (its last good content stays in force)"),
        }
    }
}

fn problem(path: &Path, line: u32, reason: String) -> SourceProblem {
    SourceProblem { file: path.to_string_lossy().into_owned(), line, reason }
}

/// The text of a regular file. A pipe or device is never waited for.
fn content_of(path: &Path) -> Result<String, String> {
    let unreadable = |error: io::Error| format!("can't be read: {error}; check its permissions");
    // O_NONBLOCK: a pipe that took the file's place since the walk must not hold up the scan.
    let file = OpenOptions::new().read(true).custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits()).open(path);
    let file = file.map_err(unreadable)?;
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err("is not a regular file".into());
    }
    let mut octets = Vec::new();
    file.take(FILE_OCTETS_MAX + 1).read_to_end(&mut octets).map_err(unreadable)?;
    if octets.len() as u64 > FILE_OCTETS_MAX {
        return Err("is larger than 1 MiB; split it".into());
    }
    String::from_utf8(octets).map_err(|_| "is not UTF-8 text".into())
}

fn parse(text: &str, relative: &Path, cluster: &ClusterId) -> Result<Vec<Declared>, Vec<(u32, String)>> {
    let documents = k8s::documents(text)
        .map_err(|wrong| wrong.into_iter().map(|one| (one.line, one.reason)).collect::<Vec<_>>())?;
    let file: Arc<str> = relative.to_string_lossy().into();
    let (mut objects, mut wrong) = (Vec::new(), Vec::new());
    for k8s::Document { line, resource } in documents {
        match k8s::declared(resource, cluster).and_then(|object| object.map(checked).transpose()) {
            Ok(None) => {}
            Ok(Some(object)) => objects.push(Declared { place: Place { file: file.clone(), line }, object }),
            Err(reason) => wrong.push((line, reason)),
        }
    }
    if wrong.is_empty() { Ok(objects) } else { Err(wrong) }
}

fn closing(text: &str, relative: &Path, cluster: &ClusterId) -> Vec<Declared> {
    let file: Arc<str> = relative.to_string_lossy().into();
    let object = |k8s::Document { line, resource }| {
        let object = k8s::declared(resource, cluster).ok().flatten()?;
        Some(Declared { place: Place { file: file.clone(), line }, object })
    };
    k8s::access_policies(text).into_iter().filter_map(object).collect()
}

/// Checks what core can't: that a declared bundle holds roots of the trust domain that it is for.
fn checked(object: Object) -> Result<Object, String> {
    let Object::Peer(peer) = &object else { return Ok(object) };
    let (Some(bundle), Some(trust_domain)) = (&peer.bundle, &peer.trust_domain) else { return Ok(object) };
    let cluster = &peer.cluster;
    match Bundle::from_pem(bundle.roots_pem.as_bytes()) {
        Ok(read) if read.trust_domain() == trust_domain => Ok(object),
        Ok(read) => Err(format!(
            "ClusterPeer {cluster}: the roots of spec.bundle are those of trust domain {}, not of {trust_domain}",
            read.trust_domain()
        )),
        Err(error) => Err(format!("ClusterPeer {cluster}: spec.bundle.roots: {error}")),
    }
}

/// The YAML files below a root, by relative path.
#[derive(Default)]
struct Walk {
    files: BTreeMap<PathBuf, Metadata>,
    problems: Vec<SourceProblem>,
    /// Folders that could not be listed, relative: what was known below them stays.
    unreadable: Vec<PathBuf>,
    /// Folders on the way, by device and inode, so that a symbolic link can't make the walk endless.
    visited: BTreeSet<(u64, u64)>,
}

impl Walk {
    fn over(root: &Path) -> Self {
        let mut walk = Self::default();
        walk.folder(root, Path::new(""), 0);
        walk
    }

    fn folder(&mut self, root: &Path, relative: &Path, depth: usize) {
        let path = root.join(relative);
        let listed = fs::metadata(&path).and_then(|metadata| Ok((metadata, fs::read_dir(&path)?)));
        let (metadata, entries) = match listed {
            Ok(listed) => listed,
            Err(error) => return self.unreadable(&path, relative, &error),
        };
        if !self.visited.insert((metadata.dev(), metadata.ino())) {
            return;
        }
        let mut names = BTreeSet::new();
        for entry in entries {
            match entry {
                Ok(entry) => _ = names.insert(entry.file_name()),
                Err(error) => return self.unreadable(&path, relative, &error),
            }
            if names.len() > 4 * FILES_MAX {
                self.problems.push(problem(
                    relative,
                    0,
                    "the directory has too many entries; they are not read".into(),
                ));
                return self.unreadable.push(relative.into());
            }
        }
        for name in names {
            // Hidden names are temporary files of editors, and the inner side of mounted ConfigMaps.
            if !name.to_string_lossy().starts_with('.') {
                self.entry(root, &relative.join(name), depth);
            }
        }
    }

    fn entry(&mut self, root: &Path, relative: &Path, depth: usize) {
        let is_yaml = relative.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        // Follows symbolic links: a ConfigMap mounted as a volume consists of them.
        let metadata = match fs::metadata(root.join(relative)) {
            Ok(metadata) => metadata,
            // Gone since it was listed.
            Err(error)
                if error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(root.join(relative)).is_err() =>
            {
                return;
            }
            Err(_) if !is_yaml => return,
            Err(error) => {
                self.problems.push(problem(
                    relative,
                    0,
                    format!("can't be read: {error}; check the link or its permissions"),
                ));
                return self.unreadable.push(relative.into());
            }
        };
        if metadata.is_dir() {
            if depth == DEPTH_MAX {
                return self.problems.push(problem(
                    relative,
                    0,
                    format!("is nested deeper than {DEPTH_MAX} directories"),
                ));
            }
            self.folder(root, relative, depth + 1);
        } else if is_yaml && metadata.is_file() {
            if self.files.len() == FILES_MAX {
                let reason = format!("more than {FILES_MAX} files; this one and later ones are not read");
                return self.report_once(relative, reason);
            }
            self.files.insert(relative.into(), metadata);
        } else if is_yaml {
            self.problems.push(problem(relative, 0, "is not a regular file".into()));
        }
    }

    fn report_once(&mut self, relative: &Path, reason: String) {
        if self.problems.iter().all(|problem| problem.reason != reason) {
            self.problems.push(problem(relative, 0, reason));
        }
    }

    fn unreadable(&mut self, path: &Path, relative: &Path, error: &io::Error) {
        let reason = format!("the directory can't be read: {error}; its last good content stays in force");
        self.problems.push(problem(path, 0, reason));
        self.unreadable.push(relative.into());
    }
}
