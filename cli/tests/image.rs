//! The container image: built as `deploy/image` builds it, and run as a container runtime would, with nothing but the image's files.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{World, binary, installed, skip};
use tombolo_testbed::{Announced, Cluster, Process};

/// Who the image's process is.
const USER: u32 = 65532;
const START_TIME_MAX: Duration = Duration::from_secs(30);

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let told = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat();
    assert!(output.status.success(), "{command:?}: {told}");
    told
}

fn unpack(archive: &Path, into: &Path) {
    fs::create_dir_all(into).unwrap();
    succeed(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(into));
}

/// Builds the image with the profile of this test's program, and gives its configuration and its file system.
fn image(folder: &Path) -> (Value, PathBuf) {
    fs::create_dir(folder).unwrap();
    let program = binary().path().to_owned();
    let built = program.parent().unwrap();
    let profile = if built.ends_with("debug") { "dev" } else { built.file_name().unwrap().to_str().unwrap() };
    let archive = folder.join("image.tar");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/image");
    succeed(Command::new(script).arg(&archive).arg(profile).env("CARGO_TARGET_DIR", built.parent().unwrap()));
    let parts = folder.join("parts");
    unpack(&archive, &parts);
    let read = |name: &str| serde_json::from_str::<Value>(&fs::read_to_string(parts.join(name)).unwrap()).unwrap();
    let manifest = read("manifest.json");
    let root = folder.join("root");
    for layer in manifest[0]["Layers"].as_array().unwrap() {
        unpack(&parts.join(layer.as_str().unwrap()), &root);
    }
    (read(manifest[0]["Config"].as_str().unwrap())["config"].clone(), root)
}

/// What every container runtime adds: a name for loopback, and a source of randomness.
fn furnish(root: &Path) {
    for folder in ["etc", "dev", "v"] {
        fs::create_dir(root.join(folder)).unwrap();
    }
    fs::write(root.join("etc/hosts"), "127.0.0.1 federation.test\n").unwrap();
    for (device, minor) in [("random", "8"), ("urandom", "9")] {
        succeed(Command::new("mknod").args(["-m", "0444"]).arg(root.join("dev").join(device)).args(["c", "1", minor]));
    }
    std::os::unix::fs::chown(root.join("v"), Some(USER), Some(USER)).unwrap();
    // The folders above are the test's own, and it is somebody else who passes through them.
    for above in root.ancestors().take_while(|folder| *folder != std::env::temp_dir()) {
        fs::set_permissions(above, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[tokio::test]
async fn its_gateway_runs_from_scratch_as_nobody_and_finds_its_federation_by_name() {
    if !nix::unistd::geteuid().is_root() {
        return skip("root: it enters the image's file system");
    }
    let Some(()) = installed(&["buildah", "chroot", "mknod", "tar"]) else { return };
    let world = World::new().await;
    let (config, root) = image(&world.directory.path().join("image"));
    assert_eq!((&config["User"], &config["Entrypoint"]), (&json!("65532:65532"), &json!(["/tombolo"])));
    let files: Vec<_> = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["tombolo"]);

    furnish(&root);
    let mut west = Cluster::new(&binary(), "west", world.directory.path(), json!({})).unwrap();
    let discovery = west.start_federation(json!({})).await.unwrap().address("discovery").unwrap();
    let volume = root.join("v");
    fs::copy(Path::new(&west.state()).join("ca.pem"), volume.join("ca.pem")).unwrap();
    let token = volume.join("join");
    west.operator(&["join", "add", "--gateway", "gw", "--out", token.to_str().unwrap()]).await.unwrap();
    for file in [&token, &volume.join("ca.pem")] {
        std::os::unix::fs::chown(file, Some(USER), Some(USER)).unwrap();
    }
    let fields = json!({
        "id": "gw",
        "federation": { "address": format!("federation.test:{}", discovery.port()), "ca": "/v/ca.pem" },
        "join": "/v/join",
        "state": "/v/state",
        "tunnel": "127.0.0.1:0",
        "ingress": "127.0.0.1:0",
        "watch": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
    });
    fs::write(volume.join("gateway.yaml"), fields.to_string()).unwrap();
    let user = format!("--userspec={USER}:{USER}");
    let arguments = [&user, root.to_str().unwrap(), "/tombolo", "gateway", "--config", "/v/gateway.yaml"];
    let mut gateway = Process::start_other(Path::new("chroot"), "gw", world.directory.path(), &arguments).unwrap();
    let announced = gateway
        .wait_for(&volume.join("state/gateway.json"), Instant::now() + START_TIME_MAX, |text| {
            serde_json::from_str::<Announced>(text).ok()
        })
        .await
        .unwrap();
    assert!(announced.address("tunnel").is_ok());
    let status = fs::read_to_string(format!("/proc/{}/status", gateway.pid().unwrap())).unwrap();
    let uid = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
    assert_eq!(uid.split_whitespace().nth(1), Some(USER.to_string().as_str()), "{uid}");
    gateway.stop(Duration::from_secs(10)).await;
    west.stop().await;
}
