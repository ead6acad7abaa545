//! Probes that the sidecar answers in the application's place.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tombolo_runtime::config::parse;
use tombolo_runtime::drain::DrainWatch;
use tombolo_sidecar::Config;
use tombolo_sidecar::probes::{ProbesConfig, start};

/// An application that is well for whoever asks for `/ok` on `app.example`.
async fn app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match tcp.read_u8().await {
                        Ok(octet) => head.push(octet),
                        Err(_) => return,
                    }
                }
                let head = String::from_utf8(head).unwrap();
                let well = head.starts_with("GET /ok ") && head.contains("host: app.example\r\n");
                let status = if well { "204 No Content" } else { "500 Internal Server Error" };
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                let _ = tcp.write_all(answer.as_bytes()).await;
            });
        }
    });
    address
}

async fn ask(probes: SocketAddr, request: &str) -> u16 {
    let mut stream = TcpStream::connect(probes).await.unwrap();
    stream.write_all(format!("{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

fn config(probes: &str) -> Result<ProbesConfig, String> {
    let text = format!(
        "instance: web-1\nstate: /x\nfederation: {{address: 'a:1', ca: /x}}\nprobes: {{listen: '127.0.0.1:0', targets: {probes}}}\n"
    );
    let config = parse::<Config>(&text, Path::new("sidecar.yaml")).map_err(|error| error.to_string())?;
    Ok(config.probes.unwrap())
}

#[tokio::test]
async fn each_path_asks_the_application_its_own_question() {
    let app = app().await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = silent.local_addr().map(|address| (silent, address)).unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let named = "http: {path: /ok, headers: {Host: app.example}}";
    let probes = config(&format!(
        "[{{path: /app/live, app: '{app}', {named}}}, {{path: /app/other, app: '{app}', http: {{path: /ok}}}}, \
         {{path: /app/tcp, app: '{app}', tcp: {{}}}}, {{path: /gone, app: '{closed}'}}, \
         {{path: /silent, app: '{}', http: {{path: /}}, timeout: 100ms}}]",
        silent.1
    ));
    let address = start(&probes.unwrap(), DrainWatch::never()).await.unwrap();
    for (request, want) in [
        ("GET /app/live", 200),
        ("HEAD /app/live", 200),
        ("GET /app/other", 503),
        ("GET /app/tcp", 200),
        ("GET /gone", 503),
        ("GET /silent", 504),
        ("GET /app", 404),
        ("POST /app/live", 405),
    ] {
        assert_eq!(ask(address, request).await, want, "{request}");
    }
}

#[test]
fn what_can_not_be_asked_is_refused() {
    for (targets, want) in [
        ("[]", "probes.targets"),
        ("[{path: live, app: 'a:1'}]", "a path begins with /"),
        ("[{path: /a, app: 'a:1'}, {path: /a, app: 'a:2'}]", "two targets have this path"),
        ("[{path: /a, app: 'a:1', tcp: {}, grpc: {}}]", "only one of"),
        ("[{path: /a, app: 'a:1', timeout: 0s}]", "in no time"),
    ] {
        let refused = config(targets).unwrap_err();
        assert!(refused.contains(want), "{targets}: {refused}");
    }
}
