//! One request, one trace, as a real Jaeger stores it.

#![allow(clippy::unwrap_used)]

mod support;

use serde_json::{Value, json};
use support::{World, app, curl, curl_until, link, serve, skip, start_caller, tools, until};
use tombolo_testbed::Jaeger;

async fn jaeger(directory: &std::path::Path) -> Option<Jaeger> {
    let binary = tools().join("jaeger");
    if !binary.exists() {
        skip("Jaeger (testbed/tools/install builds it with Go)");
        return None;
    }
    let jaeger = Jaeger::start(&binary, directory).await.unwrap();
    until("Jaeger to answer", async || jaeger.get("/api/services").await.ok()).await;
    Some(jaeger)
}

/// The spans of one trace, once `complete` finds all that it looks for in them.
async fn trace(jaeger: &Jaeger, id: &str, complete: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    until(&format!("trace {id} to be whole"), async || {
        let answer = jaeger.get(&format!("/api/traces/{id}")).await.ok()?;
        let spans = answer["data"][0]["spans"].as_array()?.clone();
        complete(&spans).then_some(spans)
    })
    .await
}

fn tag<'a>(span: &'a Value, key: &str) -> Option<&'a str> {
    span["tags"].as_array()?.iter().find(|tag| tag["key"] == key)?["value"].as_str()
}

fn of_kind<'a>(spans: &'a [Value], kind: &str) -> Option<&'a Value> {
    spans.iter().find(|span| tag(span, "span.kind") == Some(kind))
}

#[tokio::test]
async fn two_requests_over_one_warm_leg_are_two_whole_traces() {
    let world = World::new().await;
    let Some(jaeger) = jaeger(world.directory.path()).await else { return };
    let common = json!({ "telemetry": { "otlp": format!("http://{}", jaeger.otlp) } });
    let (mut east, mut west) = tokio::join!(
        world.cluster_with("east", common.clone(), json!({})),
        world.cluster_with("west", common.clone(), json!({}))
    );
    let web = app::http("web-in-west").await;
    serve(&mut west, "web", "http", "http", web.address).await;
    link(&west, &east).await;
    west.operator(&["export", "web.shop"]).await.unwrap();
    let proxy = start_caller(&mut east).await;
    let url = "http://web.shop.svc.clusterset.local/";
    // Warms the leg, in a trace of its own.
    curl_until(proxy, url, "web-in-west").await;

    for trace_id in ["0af7651916cd43dd8448eb211c80319c", "1bf7651916cd43dd8448eb211c80319d"] {
        let parent = format!("traceparent: 00-{trace_id}-b7ad6b7169203331-01");
        let answer = curl(proxy, &["-H", &parent, url]).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let spans =
            trace(&jaeger, trace_id, |spans| of_kind(spans, "client").is_some() && of_kind(spans, "server").is_some())
                .await;
        let (client, server) = (of_kind(&spans, "client").unwrap(), of_kind(&spans, "server").unwrap());
        assert_eq!(
            server["references"][0]["spanID"], client["spanID"],
            "the server's span is the client's child: {server}"
        );
        assert_eq!(tag(client, "tombolo.path"), Some("east/gw > west/gw"), "{client}");
        let links =
            client["references"].as_array().unwrap().iter().filter(|reference| reference["refType"] == "FOLLOWS_FROM");
        assert_eq!(links.count(), 2, "both gateways' leg spans are linked: {client}");
    }
    tokio::join!(east.stop(), west.stop());
}
