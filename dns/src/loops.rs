//! Whether a resolver sends what it is asked back here: then every relayed question would go round until somebody gives
//! up, and take all others with it.
//!
//! Each resolver is asked for a name that nobody can guess and that nobody has. If the question arrives at this server, the
//! resolver is not asked any more until it no longer does.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::message::Query;
use crate::server::DnsServer;

/// How often every resolver is asked: rarely, since nobody can answer that from a cache.
const EVERY: Duration = Duration::from_secs(600);
/// The same while one of them asks back.
const AGAIN: Duration = Duration::from_secs(30);
/// How often it is looked for other resolvers.
const LOOK: Duration = Duration::from_secs(5);
/// HINFO: nobody else asks for it, and no search list or cache cares.
const TYPE_HINFO: u16 = 13;

/// The names that are asked for.
#[derive(Debug)]
pub struct Probes {
    /// Second label of every one of them.
    own: String,
    /// First labels of those that are on their way, and whether they came back.
    under_way: Mutex<Vec<(String, bool)>>,
}

impl Default for Probes {
    fn default() -> Self {
        Self { own: label(), under_way: Mutex::default() }
    }
}

impl Probes {
    /// Whether a question is one of these; it is remembered that it came back.
    pub fn came_back(&self, query: &Query<'_>) -> bool {
        let labels = query.labels();
        let [first, own] = labels.as_slice() else { return false };
        if !own.eq_ignore_ascii_case(self.own.as_bytes()) {
            return false;
        }
        let mut under_way = self.under_way();
        let known = under_way.iter_mut().find(|(label, _)| first.eq_ignore_ascii_case(label.as_bytes()));
        if let Some((_, came_back)) = known {
            *came_back = true;
        }
        true
    }

    /// The next question.
    fn begin(&self) -> (String, Vec<u8>) {
        let first = label();
        self.under_way().push((first.clone(), false));
        let mut octets = rand::random::<u16>().to_be_bytes().to_vec();
        // One question; recursion is desired.
        octets.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        for label in [&first, &self.own] {
            octets.push(u8::try_from(label.len()).expect("sixteen digits"));
            octets.extend(label.as_bytes());
        }
        octets.push(0);
        octets.extend([TYPE_HINFO, 1].map(u16::to_be_bytes).concat());
        (first, octets)
    }

    /// Whether it came back.
    fn end(&self, first: &str) -> bool {
        let mut under_way = self.under_way();
        let place = under_way.iter().position(|(label, _)| label == first);
        place.is_some_and(|place| under_way.swap_remove(place).1)
    }

    fn under_way(&self) -> MutexGuard<'_, Vec<(String, bool)>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn label() -> String {
    format!("{:016x}", rand::random::<u64>())
}

/// Looks for loops until `stop`.
pub async fn watch(server: Arc<DnsServer>, stop: CancellationToken) {
    let (mut looping, mut known, mut asked) = (BTreeSet::new(), None, Instant::now());
    let watching = async {
        loop {
            let now = Instant::now();
            let resolvers = server.upstreams().resolvers(now);
            let pause = if looping.is_empty() { EVERY } else { AGAIN };
            if known.as_ref() == Some(&resolvers) && now.duration_since(asked) < pause {
                tokio::time::sleep(LOOK).await;
                continue;
            }
            (known, asked) = (Some(resolvers.clone()), now);
            let mut found = BTreeSet::new();
            for resolver in &*resolvers {
                if comes_back(&server, *resolver).await {
                    found.insert(*resolver);
                }
            }
            say(&looping, &found);
            server.upstreams().leave_out(found.clone());
            looping = found;
        }
    };
    tokio::select! {
        () = watching => {}
        () = stop.cancelled() => {}
    }
}

async fn comes_back(server: &DnsServer, resolver: SocketAddr) -> bool {
    let (first, octets) = server.probes().begin();
    if let Ok(query) = Query::read(&octets) {
        server.upstreams().probe(resolver, &query).await;
    }
    server.probes().end(&first)
}

fn say(before: &BTreeSet<SocketAddr>, found: &BTreeSet<SocketAddr>) {
    for resolver in found.difference(before) {
        tracing::error!(
            %resolver,
            "what this resolver is asked comes back here, so it is not asked any more: name resolvers in dns.upstreams that do \
             not forward to this server, and exclude the sidecar itself if DNS is captured"
        );
    }
    for resolver in before.difference(found) {
        tracing::info!(%resolver, "what this resolver is asked no longer comes back; it is asked again");
    }
}
