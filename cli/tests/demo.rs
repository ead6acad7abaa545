//! `tombolo demo` as its users run it.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::UdpSocket;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{binary, running_with, until};
use tokio::process::Command;

/// The demo, with its temporary files below `directory`.
fn demo(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary().path());
    command.arg("demo").args(arguments).env("TMPDIR", directory).stdin(Stdio::null()).kill_on_drop(true);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn nothing_is_left(directory: &Path) {
    assert_eq!(running_with(directory), Vec::<String>::new(), "processes");
    let files: Vec<_> = std::fs::read_dir(directory).unwrap().flatten().map(|entry| entry.path()).collect();
    assert_eq!(files, Vec::<std::path::PathBuf>::new(), "files");
}

#[tokio::test]
async fn the_demo_really_happens_and_leaves_nothing_behind() {
    let world = support::World::new().await;
    let directory = world.directory.path();
    let output =
        tokio::time::timeout(Duration::from_secs(120), demo(directory, &["--once"]).output()).await.unwrap().unwrap();
    let (shown, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{shown}\n{errors}");
    for fact in [
        "spiffe://west.tombolo/ns/shop/sa/web",
        "spiffe://east.tombolo/ns/shop/sa/frontend",
        "east/gw",
        "west/gw",
        "requests failed",
        "back in east",
    ] {
        assert!(shown.contains(fact), "{fact} is missing in:\n{shown}");
    }
    nothing_is_left(directory);
}

#[tokio::test]
async fn without_its_udp_port_the_demo_fails_and_names_the_step() {
    let world = support::World::new().await;
    let directory = world.directory.path();
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let run = demo(directory, &["--once", "--tunnel-port", &port]).output();
    let output = tokio::time::timeout(Duration::from_secs(60), run).await.unwrap().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(errors.contains("step 1, starting two clusters") && errors.contains(&port), "{errors}");
    nothing_is_left(directory);
}

#[tokio::test]
async fn an_interrupted_demo_leaves_nothing_behind() {
    let world = support::World::new().await;
    let directory = world.directory.path();
    let mut running = demo(directory, &[]).spawn().unwrap();
    until("the demo to start its processes", async || (running_with(directory).len() > 4).then_some(())).await;
    kill(Pid::from_raw(running.id().unwrap().cast_signed()), Signal::SIGINT).unwrap();
    tokio::time::timeout(Duration::from_secs(20), running.wait()).await.unwrap().unwrap();
    nothing_is_left(directory);
}
