//! A peering attempt from one federation to another, through two gateways that only carry it.

use std::time::Duration;

use tombolo_core::refusal::Refusal;
use tombolo_gateway::peering;
use tombolo_leg::discovery::{PeeringCommand, PeeringReport};
use tombolo_trust::bundle::root_sha256;

use crate::support::*;

async fn next(node: &mut Node) -> PeeringReport {
    tokio::time::timeout(Duration::from_secs(20), node.reports.recv()).await.unwrap().unwrap()
}

/// Two clusters that do not know each other.
async fn strangers() -> (Cluster, Node, Cluster, Node) {
    let (east, west) = (Cluster::new("east"), Cluster::new("west"));
    let (east_node, west_node) = (Node::start(&east, "gw-e", &[]).await, Node::start(&west, "gw-w", &[]).await);
    (east, east_node, west, west_node)
}

fn dial(to: &Node, root_sha256: [u8; 32]) -> PeeringCommand {
    PeeringCommand::Dial {
        attempt: "a-1".into(),
        addresses: vec!["127.0.0.1:1".into(), to.tunnel.to_string()],
        root_sha256,
        cluster: "east".parse().unwrap(),
    }
}

#[tokio::test]
async fn an_offer_and_its_answer_cross_with_the_same_exporter_at_both_ends() {
    let (east, mut east_node, west, mut west_node) = strangers().await;
    peering::handle(west_node.gateway(), dial(&east_node, east.ca.active_root_sha256()));
    let PeeringReport::Exporter { attempt, exporter } = next(&mut west_node).await else { panic!() };
    assert_eq!((attempt.as_str(), exporter.len()), ("a-1", 32));
    let offer = vec![9; 60_000];
    peering::handle(west_node.gateway(), PeeringCommand::Offer { attempt, offer: offer.clone() });

    let PeeringReport::Knock { attempt, exporter: seen, offer: got, chain_der } = next(&mut east_node).await else {
        panic!()
    };
    assert_eq!(seen, exporter);
    assert!(got == offer);
    let leaf = chain_der[0].clone().into();
    let id = tombolo_trust::tls::identity_of(&[leaf]).unwrap();
    assert_eq!(id, west.spiffe_id("tombolo/gateway/gw-w"));
    let answer = vec![8; 50_000];
    peering::handle(east_node.gateway(), PeeringCommand::Verdict { attempt, answer: answer.clone() });

    let PeeringReport::Answer { attempt, answer: got } = next(&mut west_node).await else { panic!() };
    assert_eq!(attempt, "a-1");
    assert!(got == answer);
}

#[tokio::test]
async fn another_root_than_the_pinned_one_is_not_dialled() {
    let (_east, east_node, west, mut west_node) = strangers().await;
    let wrong = root_sha256(&west.ca.bundle().roots()[0]);
    peering::handle(west_node.gateway(), dial(&east_node, wrong));
    let PeeringReport::Failed { attempt, reason } = next(&mut west_node).await else { panic!() };
    assert_eq!(attempt, "a-1");
    assert!(!reason.is_empty());
}

#[tokio::test]
async fn an_offer_above_the_limit_is_refused() {
    let (east, mut east_node, _west, mut west_node) = strangers().await;
    peering::handle(west_node.gateway(), dial(&east_node, east.ca.active_root_sha256()));
    let PeeringReport::Exporter { attempt, .. } = next(&mut west_node).await else { panic!() };
    peering::handle(west_node.gateway(), PeeringCommand::Offer { attempt, offer: vec![9; 70_000] });
    let PeeringReport::Failed { reason, .. } = next(&mut west_node).await else { panic!() };
    assert!(reason.contains(Refusal::BadHeader.explanation()), "{reason}");
    assert!(east_node.reports.try_recv().is_err());
    assert_eq!(east_node.refusals(Refusal::BadHeader), 1);
}

#[tokio::test]
async fn an_attempt_without_a_verdict_ends_in_time() {
    let (east, mut east_node, _west, mut west_node) = strangers().await;
    peering::handle(west_node.gateway(), dial(&east_node, east.ca.active_root_sha256()));
    let PeeringReport::Exporter { attempt, .. } = next(&mut west_node).await else { panic!() };
    peering::handle(west_node.gateway(), PeeringCommand::Offer { attempt, offer: vec![9] });
    let PeeringReport::Knock { attempt, .. } = next(&mut east_node).await else { panic!() };
    let PeeringReport::Failed { .. } = next(&mut west_node).await else { panic!() };
    eventually("counted", || east_node.refusals(Refusal::Timeout) == 1).await;
    // A verdict that comes too late finds nobody.
    peering::handle(east_node.gateway(), PeeringCommand::Verdict { attempt, answer: vec![1] });
}
