//! What the kernel says: the CPU and memory of processes, the load that is not ours, and the machine.

use std::collections::BTreeMap;
use std::fs;

use anyhow::Context as _;
use serde::Serialize;

/// `USER_HZ`, which Linux fixes at 100 for what it shows in `/proc`.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds that `pids` have used so far, their ended threads included.
pub fn cpu_seconds(pids: &[u32]) -> anyhow::Result<f64> {
    let mut total = 0.0;
    for pid in pids {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
        let (_, fields) = stat.rsplit_once(") ").context("/proc/<pid>/stat")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        // Fields 14 and 15 of proc(5); the first two stand before the cut.
        total += (fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / TICKS_PER_SECOND;
    }
    Ok(total)
}

/// Resident memory of a process in MB (10^6 bytes).
pub fn resident_mb(pid: u32) -> anyhow::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let kibibytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024.0 / 1e6)
}

/// CPU seconds of the whole machine since it started: everything but idle and waiting.
fn machine_seconds() -> anyhow::Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("/proc/stat")?;
    let fields: Vec<f64> = line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    let busy = fields[0] + fields[1] + fields[2] + fields[5] + fields[6];
    Ok(busy / TICKS_PER_SECOND)
}

/// This process and all that it started, by walking the parents.
fn family() -> anyhow::Result<Vec<u32>> {
    let mut parents: BTreeMap<u32, u32> = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let parent = stat.rsplit_once(") ").and_then(|(_, fields)| fields.split(' ').nth(1)?.parse().ok());
        if let Some(parent) = parent {
            parents.insert(pid, parent);
        }
    }
    let mut family = vec![std::process::id()];
    let mut at = 0;
    while at < family.len() {
        let parent = family[at];
        family.extend(parents.iter().filter(|(_, of)| **of == parent).map(|(pid, _)| *pid));
        at += 1;
    }
    Ok(family)
}

/// Measures what others did to the machine meanwhile.
#[derive(Debug)]
pub struct ForeignLoad {
    machine: f64,
    ours: f64,
    began: std::time::Instant,
    family: Vec<u32>,
}

impl ForeignLoad {
    pub fn begin() -> anyhow::Result<Self> {
        let family = family()?;
        Ok(Self { machine: machine_seconds()?, ours: cpu_seconds(&family)?, began: std::time::Instant::now(), family })
    }

    /// Processors that others kept busy, on average: 0.1 means a tenth of one.
    pub fn end(&self) -> anyhow::Result<f64> {
        let machine = machine_seconds()? - self.machine;
        let ours = cpu_seconds(&self.family)? - self.ours;
        Ok(((machine - ours) / self.began.elapsed().as_secs_f64()).max(0.0))
    }
}

#[derive(Debug, Serialize)]
pub struct Machine {
    pub processors: usize,
    pub model: String,
    pub memory_gb: f64,
    pub kernel: String,
    pub tcp_congestion_control: String,
}

pub fn machine() -> anyhow::Result<Machine> {
    let read =
        |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).with_context(|| path.to_owned());
    let cpuinfo = read("/proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown");
    let meminfo = read("/proc/meminfo")?;
    let memory = meminfo.split_whitespace().nth(1).context("/proc/meminfo")?;
    Ok(Machine {
        processors: std::thread::available_parallelism()?.get(),
        model: model.trim_start_matches([' ', '\t', ':']).to_owned(),
        memory_gb: (memory.parse::<f64>()? * 1024.0 / 1e8).round() / 10.0,
        kernel: read("/proc/sys/kernel/osrelease")?,
        tcp_congestion_control: read("/proc/sys/net/ipv4/tcp_congestion_control")?,
    })
}
