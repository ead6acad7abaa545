//! Kill -9 of each role at random moments under load, and pauses longer than an SVID's life: state is intact,
//! nothing goes backwards, and traffic resumes by itself.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::process::Seen;
use support::{World, app, binary, curl_until, in_sync, link, serve, start_caller, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tombolo_testbed::Cluster;

const WEB: &str = "http://web.shop.svc.clusterset.local/";

/// Numbers from a seed (SplitMix64): what failed once can be run again.
struct Seeded(u64);

impl Seeded {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

/// 50 requests a second, whatever becomes of them.
struct Load {
    answered: Arc<AtomicU64>,
    /// When each failed request had begun, and what became of it.
    failed: Arc<Mutex<Vec<(Instant, String)>>>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Load {
    fn start(proxy: SocketAddr) -> Self {
        let (answered, failed, stop) =
            (Arc::new(AtomicU64::new(0)), Arc::<Mutex<Vec<_>>>::default(), Arc::new(AtomicBool::new(false)));
        let (yes, no, ends) = (answered.clone(), failed.clone(), stop.clone());
        let task = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(20));
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            let mut requests = tokio::task::JoinSet::new();
            while !ends.load(Ordering::Relaxed) {
                tick.tick().await;
                let (yes, no) = (yes.clone(), no.clone());
                requests.spawn(async move {
                    let began = Instant::now();
                    let asked = tokio::time::timeout(Duration::from_secs(5), ask(proxy)).await;
                    let failure = match asked {
                        Ok(Ok(())) => {
                            yes.fetch_add(1, Ordering::Relaxed);
                            return;
                        }
                        Ok(Err(error)) => error.to_string(),
                        Err(_) => "no answer".to_owned(),
                    };
                    no.lock().unwrap().push((began, failure));
                });
                while requests.try_join_next().is_some() {}
            }
            requests.join_all().await;
        });
        Self { answered, failed, stop, task }
    }

    /// What became of the requests that began after `since` and failed.
    fn failed(&self, since: Instant) -> Vec<String> {
        let failed = self.failed.lock().unwrap();
        failed.iter().filter(|(began, _)| *began > since).map(|(_, failure)| failure.clone()).collect()
    }

    async fn end(self) -> (u64, usize) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
        (self.answered.load(Ordering::Relaxed), self.failed.lock().unwrap().len())
    }
}

async fn ask(proxy: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(proxy).await?;
    let request = format!("GET {WEB} HTTP/1.1\r\nhost: web.shop.svc.clusterset.local\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let answered = answer.starts_with("HTTP/1.1 200") && answer.contains("web-in-west");
    if answered { Ok(()) } else { Err(std::io::Error::other(answer)) }
}

/// What a cluster says of itself that must outlive any process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Lasting {
    trust_domain: String,
    root: String,
    peers: BTreeSet<String>,
    sidecars: BTreeMap<String, String>,
}

/// What only ever grows, by name.
type Growing = BTreeMap<String, (u64, u64)>;

async fn read(cluster: &Cluster) -> Option<(Lasting, Growing)> {
    let status = cluster.status().await.ok()?;
    let rows = |key: &str| status[key].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let number = |value: &Value| {
        value.as_u64().or_else(|| value.as_str().and_then(|text| text.parse().ok())).unwrap_or_default()
    };
    let lasting = Lasting {
        trust_domain: text(&status["trustDomain"]),
        root: text(&status["rootSha256"]),
        peers: rows("peers").iter().map(|row| format!("{} {}", row["cluster"], row["trustDomain"])).collect(),
        sidecars: rows("sidecars").iter().map(|row| (text(&row["instance"]), text(&row["spiffeId"]))).collect(),
    };
    let mut growing = Growing::new();
    growing.insert("epoch".into(), (number(&status["epoch"]), 0));
    growing.insert("bundle".into(), (number(&status["bundleSequence"]), 0));
    for row in rows("peers") {
        let peer = text(&row["cluster"]);
        growing.insert(format!("sync of {peer}"), (number(&row["epoch"]), number(&row["revision"])));
        growing.insert(format!("bundle of {peer}"), (number(&row["bundleSequence"]), 0));
    }
    Some((lasting, growing))
}

/// Nothing went backwards since `before`; gives what holds now.
fn grown(cluster: &str, before: &Growing, now: Growing) -> Growing {
    for (name, value) in before {
        let held = now.get(name).unwrap_or_else(|| panic!("{name} of {cluster} is lost: {now:?}"));
        assert!(held >= value, "{name} of {cluster} went from {value:?} back to {held:?}");
    }
    now
}

fn temporary_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            temporary_files(&path, found);
        } else if entry.file_name().to_string_lossy().contains(".tmp")
            || entry.file_name().to_string_lossy().ends_with(".new")
        {
            found.push(path);
        }
    }
}

async fn no_temporary_files(cluster: &Cluster, role: &str) {
    let folder = cluster.dir().join(role);
    until(&format!("no temporary files in {}", folder.display()), async || {
        let mut found = Vec::new();
        temporary_files(&folder, &mut found);
        found.is_empty().then_some(())
    })
    .await;
}

/// Changes what the federation keeps while it may be killed; whether it said that it had.
async fn change(state: String, round: u64) -> bool {
    let verb = if round.is_multiple_of(2) { "export" } else { "unexport" };
    let changed = binary().run(&[verb, "other.shop", "--state", &state]).await.is_ok();
    let _ = binary().run(&["join", "add", "--workload", "shop/spare", "--state", &state]).await;
    changed
}

async fn exported(cluster: &Cluster, service: &str) -> Option<bool> {
    let status = cluster.status().await.ok()?;
    let rows = status["services"].as_array()?.clone();
    let row = rows.iter().find(|row| row["service"] == service)?;
    let own = row["shares"].as_array()?.iter().find(|share| share["local"] == true)?.clone();
    own["exported"].as_bool()
}

#[tokio::test]
async fn any_role_may_be_killed_at_any_moment() {
    let seed = std::env::var("TOMBOLO_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("TOMBOLO_SEED={seed}");
    let mut seeded = Seeded(seed);
    let world = World::new().await;
    let (mut east, mut west) = tokio::join!(world.cluster("east"), world.cluster("west"));
    let web = app::http("web-in-west").await;
    serve(&mut west, "web", "http", "http", web.address).await;
    west.declare_service("shop", "other", &[("http", 80)]).unwrap();
    link(&west, &east).await;
    until("the declared service", async || exported(&west, "shop/other").await).await;
    west.operator(&["export", "web.shop"]).await.unwrap();
    let proxy = start_caller(&mut east).await;
    curl_until(proxy, WEB, "web-in-west").await;
    let (east_lasts, mut east_grows) = until("the status of east", async || read(&east).await).await;
    let (west_lasts, mut west_grows) = until("the status of west", async || read(&west).await).await;
    assert!(west_lasts.sidecars.contains_key("web") && !west_lasts.peers.is_empty(), "{west_lasts:?}");

    let load = Load::start(proxy);
    let began = Instant::now();
    let mut round = 0;
    'rounds: loop {
        let mut roles = [
            ("east", "gw"),
            ("west", "gw"),
            ("east", "federation"),
            ("west", "federation"),
            ("east", "frontend"),
            ("west", "web"),
        ];
        seeded.shuffle(&mut roles);
        for (cluster, role) in roles {
            // Every role at least once, and then for as long as there is time.
            if round >= 6 && began.elapsed() > Duration::from_secs(30) {
                break 'rounds;
            }
            round += 1;
            let changing = tokio::spawn(change(west.state(), round));
            tokio::time::sleep(Duration::from_millis(seeded.below(250))).await;
            let killed = Instant::now();
            let side = if cluster == "east" { &mut east } else { &mut west };
            side.kill(role).await.unwrap();
            tokio::time::sleep(Duration::from_millis(seeded.below(300))).await;
            side.restart(role).await.unwrap();
            no_temporary_files(side, role).await;
            until(&format!("traffic after {role} of {cluster} was killed"), async || ask(proxy).await.ok()).await;
            let (resumed, failed) = (killed.elapsed(), load.failed(killed));
            let changed = changing.await.unwrap();
            println!(
                "{role} of {cluster}: traffic {resumed:?} after the kill, {} failed, changed {changed}",
                failed.len()
            );
            // Requests need no federation, not even the own one.
            assert!(role != "federation" || failed.is_empty(), "without the federation of {cluster}: {failed:?}");
            if changed {
                let want = round.is_multiple_of(2);
                until("what was acknowledged to hold", async || {
                    (exported(&west, "shop/other").await == Some(want)).then_some(())
                })
                .await;
            }
            for (side, lasts, grows) in [(&east, &east_lasts, &mut east_grows), (&west, &west_lasts, &mut west_grows)] {
                let (_, now) = until(&format!("{} to be whole", side.name), async || {
                    read(side).await.filter(|(lasting, _)| lasting == lasts)
                })
                .await;
                *grows = grown(&side.name, grows, now);
            }
        }
    }
    in_sync(&east, "west").await;
    in_sync(&west, "east").await;
    let (answered, failed) = load.end().await;
    println!("{round} kills, {answered} requests answered, {failed} failed");
    for (cluster, role, kind) in [
        (&east, "gw", "gateway"),
        (&west, "gw", "gateway"),
        (&east, "federation", "federation"),
        (&west, "federation", "federation"),
        (&east, "frontend", "sidecar"),
        (&west, "web", "sidecar"),
    ] {
        Seen::new(cluster, role, kind).is_sound(150);
    }
    tokio::join!(east.stop(), west.stop());
}

#[tokio::test]
async fn a_pause_longer_than_an_svids_life_locks_nobody_out() {
    const LIFE: Duration = Duration::from_secs(4);
    let world = World::new().await;
    let short = json!({ "svidLife": "4s" });
    let (mut east, mut west) = tokio::join!(
        world.cluster_with("east", json!({}), short.clone()),
        world.cluster_with("west", json!({}), short.clone())
    );
    let web = app::http("web-in-west").await;
    serve(&mut west, "web", "http", "http", web.address).await;
    link(&west, &east).await;
    west.operator(&["export", "web.shop"]).await.unwrap();
    let proxy = start_caller(&mut east).await;
    curl_until(proxy, WEB, "web-in-west").await;
    // No token is left that could help.
    for file in [east.dir().join("frontend.join"), west.dir().join("web.join"), east.dir().join("gw.join")] {
        std::fs::remove_file(file).unwrap();
    }
    for paused in [
        vec![(&east, "frontend"), (&west, "web")],
        vec![(&east, "gw")],
        // Nobody gets a new SVID for so long, and all of them expire.
        vec![(&east, "federation"), (&west, "federation")],
    ] {
        for (cluster, role) in &paused {
            cluster.process(role).unwrap().signal(Signal::SIGSTOP);
        }
        tokio::time::sleep(2 * LIFE).await;
        for (cluster, role) in &paused {
            cluster.process(role).unwrap().signal(Signal::SIGCONT);
        }
        let resumed = Instant::now();
        let names: Vec<String> = paused.iter().map(|(cluster, role)| format!("{role} of {}", cluster.name)).collect();
        until(&format!("traffic after a pause of {names:?}"), async || {
            tokio::time::timeout(Duration::from_secs(5), ask(proxy)).await.ok()?.ok()
        })
        .await;
        println!("{names:?}: traffic {:?} after the pause", resumed.elapsed());
    }
    for (cluster, role, kind) in [(&east, "frontend", "sidecar"), (&west, "web", "sidecar"), (&east, "gw", "gateway")] {
        let log = Seen::new(cluster, role, kind).log();
        assert!(!log.contains("panicked"), "{log}");
    }
    tokio::join!(east.stop(), west.stop());
}
