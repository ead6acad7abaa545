//! How many threads a process works with: as many as its CPU limit lets run at once.
//!
//! A thread beyond the limit would only spend the quota sooner, and the process would then stand still until
//! the next period. Where no limit is set, one thread is the default: it serves many thousand requests a
//! second, and a sidecar that took a thread for each processor of a large machine would cost memory for nothing.

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::thread::available_parallelism;

/// Where Linux shows the one tree of cgroup v2.
const TREE: &str = "/sys/fs/cgroup";
/// The cgroups of this process, cgroups(7).
const MEMBERSHIP: &str = "/proc/self/cgroup";

/// The number of worker threads for the CPU limit of this process.
pub fn from_cpu_limit() -> usize {
    let membership = fs::read_to_string(MEMBERSHIP).unwrap_or_default();
    let limit = cpu_limit(Path::new(TREE), &membership);
    workers(limit, available_parallelism().map_or(1, NonZeroUsize::get))
}

/// Enough threads to use the whole limit, and never more than there are processors to run them.
fn workers(limit: Option<f64>, processors: usize) -> usize {
    limit.map_or(1, |limit| (limit.ceil() as usize).clamp(1, processors.max(1)))
}

/// The tightest `cpu.max` between the process's cgroup and the root of the tree, in processors.
fn cpu_limit(tree: &Path, membership: &str) -> Option<f64> {
    let own = membership.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // A path that leads out of the tree is that of a process which was moved out of this cgroup namespace; the
    // namespace's root is then all that can be seen.
    let own = if own.split('/').any(|name| name == "..") { "" } else { own };
    let groups = Path::new(own).ancestors().map(|group| tree.join(group).join("cpu.max"));
    groups.filter_map(|file| quota(&fs::read_to_string(file).ok()?)).reduce(f64::min)
}

/// `<microseconds> <period>`, or `max <period>` for no limit.
fn quota(cpu_max: &str) -> Option<f64> {
    let mut numbers = cpu_max.split_whitespace().map(|number| number.parse::<u64>().ok());
    let (quota, period) = (numbers.next()??, numbers.next()??);
    (period > 0).then(|| quota as f64 / period as f64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_number_of_workers_follows_the_limit() {
        for (limit, processors, want) in [
            (None, 64, 1),
            (Some(0.1), 64, 1),
            (Some(1.0), 64, 1),
            (Some(1.5), 64, 2),
            (Some(4.0), 64, 4),
            (Some(4.0), 2, 2),
            (Some(0.0), 0, 1),
        ] {
            assert_eq!(workers(limit, processors), want, "{limit:?} of {processors} processors");
        }
    }

    #[test]
    fn a_quota_is_read_as_the_kernel_writes_it() {
        for (text, want) in [
            ("max 100000\n", None),
            ("50000 100000\n", Some(0.5)),
            ("300000 100000\n", Some(3.0)),
            ("100000 0\n", None),
            ("", None),
            ("100000", None),
            ("-1 100000", None),
        ] {
            assert_eq!(quota(text), want, "{text:?}");
        }
    }

    /// The limit of a process with this membership in a tree with these `cpu.max` files.
    fn check(files: &[(&str, &str)], membership: &str, want: Option<f64>) {
        let tree = tempfile::tempdir().unwrap();
        for (group, text) in files {
            let folder = tree.path().join(group);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("cpu.max"), text).unwrap();
        }
        assert_eq!(cpu_limit(tree.path(), membership), want, "{files:?} {membership:?}");
    }

    #[test]
    fn the_tightest_limit_on_the_way_to_the_root_counts() {
        // A container that sees its own cgroup as the root.
        check(&[("", "200000 100000\n")], "0::/\n", Some(2.0));
        check(&[("", "max 100000\n")], "0::/\n", None);
        let nested = [("a", "150000 100000\n"), ("a/b", "max 100000\n"), ("a/b/c", "400000 100000\n")];
        check(&nested, "0::/a/b/c\n", Some(1.5));
        check(&nested, "0::/a/b\n", Some(1.5));
        check(&nested, "0::/other\n", None);
        // Lines of cgroup v1 stand before that of v2.
        check(&nested, "4:memory:/x\n1:cpu:/a\n0::/a\n", Some(1.5));
        check(&nested, "1:cpu:/a\n", None);
        check(&nested, "", None);
        check(&[("", "200000 100000\n")], "0::/../../elsewhere\n", Some(2.0));
    }
}
