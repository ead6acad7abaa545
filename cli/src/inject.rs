//! `tombolo inject`: gives the Pods of a file of manifests their sidecars. What is added is decided in
//! `tombolo_api::inject`, as for the admission webhook.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use tombolo_api::inject::{PodSecurity, Resolver, Settings, manifests};

use crate::args::{InjectCommand, SecurityLevel};

/// Largest file that is read.
const FILE_OCTETS_MAX: u64 = 16 * 1024 * 1024;

pub fn run(command: &InjectCommand) -> anyhow::Result<()> {
    let name =
        if command.file == Path::new("-") { "standard input".into() } else { command.file.display().to_string() };
    let text = read(&command.file).with_context(|| format!("reading {name}"))?;
    let settings = Settings {
        image: command.image.clone(),
        capture_image: command.capture_image.clone().unwrap_or_else(|| command.image.clone()),
        federation: command.federation.clone(),
        trust_domain: command.trust_domain.clone(),
        resolver: Resolver {
            servers: command.cluster_dns.iter().map(ToString::to_string).collect(),
            domain: command.cluster_domain.clone(),
        },
    };
    let security = match command.pod_security {
        SecurityLevel::Privileged => PodSecurity::Privileged,
        SecurityLevel::Baseline => PodSecurity::Baseline,
        SecurityLevel::Restricted => PodSecurity::Restricted,
    };
    let (out, injected) = match manifests(&text, &settings, command.namespace.as_deref(), security) {
        Ok(done) => done,
        Err(wrong) => {
            let lines: Vec<String> =
                wrong.iter().map(|wrong| format!("{name}:{}: {}", wrong.line, wrong.reason)).collect();
            bail!("nothing was injected\n{}", lines.join("\n"));
        }
    };
    for injected in &injected {
        match &injected.outcome {
            Ok(config) => {
                check(config).with_context(|| format!("{}: the sidecar would refuse this", injected.object))?;
                anstream::eprintln!("{}: injected", injected.object);
            }
            Err(untouched) => anstream::eprintln!("{}: left as it is: {}", injected.object, untouched.reason()),
        }
    }
    anstream::print!("{out}");
    Ok(())
}

fn read(file: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let size = if file == Path::new("-") {
        std::io::stdin().take(FILE_OCTETS_MAX + 1).read_to_string(&mut text)?
    } else {
        std::fs::File::open(file)?.take(FILE_OCTETS_MAX + 1).read_to_string(&mut text)?
    };
    if size as u64 > FILE_OCTETS_MAX {
        bail!("it is larger than {FILE_OCTETS_MAX} octets");
    }
    Ok(text)
}

/// Reads the configuration as the sidecar will, with a name and an address in the place of the Pod's.
fn check(config: &Value) -> anyhow::Result<()> {
    let mut config = config.clone();
    config["instance"] = json!("pod");
    config["advertise"] = json!("192.0.2.1:15008");
    let text = serde_saphyr::to_string(&config)?;
    tombolo_runtime::config::parse::<tombolo_sidecar::Config>(&text, Path::new("sidecar.yaml"))?;
    Ok(())
}
