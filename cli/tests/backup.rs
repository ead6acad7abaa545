//! A federation whose state is lost, and restored from a backup.

#![allow(clippy::unwrap_used)]

mod support;

use support::{World, app, curl, curl_until, in_sync, link, serve, start_caller};

const WEB: &str = "http://web.shop.svc.clusterset.local/";

#[tokio::test]
async fn a_federation_that_lost_everything_is_restored_and_its_peers_take_it_without_a_new_peering() {
    let world = World::new().await;
    let (mut east, mut west) = tokio::join!(world.cluster("east"), world.cluster("west"));
    let web = app::http("web-in-west").await;
    serve(&mut west, "web", "http", "http", web.address).await;
    link(&west, &east).await;
    west.operator(&["export", "web.shop"]).await.unwrap();
    let proxy = start_caller(&mut east).await;
    curl_until(proxy, WEB, "web-in-west").await;

    let file = world.directory.path().join("west.backup").display().to_string();
    west.operator(&["backup", &file]).await.unwrap();
    let again = west.operator(&["backup", &file]).await.unwrap_err().to_string();
    assert!(again.contains("overwrites nothing"), "{again}");
    let refused = west.operator(&["restore", &file]).await.unwrap_err().to_string();
    assert!(refused.contains("restore into an empty directory"), "{refused}");

    west.kill("federation").await.unwrap();
    std::fs::remove_dir_all(west.state()).unwrap();
    assert_eq!(curl(proxy, &[WEB]).await.status, 200, "traffic needs no federation");
    west.operator(&["restore", &file]).await.unwrap();
    west.restart("federation").await.unwrap();
    in_sync(&east, "west").await;
    in_sync(&west, "east").await;
    curl_until(proxy, WEB, "web-in-west").await;
    // It is the same cluster: who has an identity of it needs no new one, and new ones are trusted.
    west.kill("web").await.unwrap();
    west.restart("web").await.unwrap();
    curl_until(proxy, WEB, "web-in-west").await;
    let late = app::http("late-in-west").await;
    serve(&mut west, "late", "http", "http", late.address).await;
    west.operator(&["export", "late.shop"]).await.unwrap();
    curl_until(proxy, "http://late.shop.svc.clusterset.local/", "late-in-west").await;
    tokio::join!(east.stop(), west.stop());
}
