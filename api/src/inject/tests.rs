#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;

fn settings() -> Settings {
    Settings {
        image: "registry.example/tombolo@sha256:abc".into(),
        capture_image: "registry.example/tombolo-capture:1".into(),
        federation: "tombolo-federation.tombolo-system.svc:15010".into(),
        trust_domain: "west.tombolo".parse().unwrap(),
        resolver: Resolver { servers: vec!["10.96.0.10".into()], domain: "cluster.local".into() },
    }
}

fn service(value: Value) -> Service {
    serde_json::from_value(value).unwrap()
}

fn web_service() -> Service {
    service(json!({
        "metadata": { "name": "web", "namespace": "shop" },
        "spec": {
            "selector": { "app": "web" },
            "ports": [
                { "name": "http", "port": 80, "targetPort": "web" },
                { "name": "admin", "port": 9000, "targetPort": 9001, "appProtocol": "kubernetes.io/h2c" },
                { "name": "dns", "port": 53, "protocol": "UDP" },
            ],
        },
    }))
}

fn web() -> Value {
    json!({
        "metadata": { "labels": { "app": "web" }, "annotations": { "team": "a" } },
        "spec": {
            "containers": [{
                "name": "app",
                "image": "web:1",
                "ports": [{ "name": "web", "containerPort": 8080 }],
                "livenessProbe": { "httpGet": { "path": "/healthz", "port": "web" }, "timeoutSeconds": 3 },
                "readinessProbe": { "tcpSocket": { "port": 8080 }, "periodSeconds": 2 },
                "startupProbe": { "exec": { "command": ["true"] } },
                "aFieldOfTomorrow": true,
            }],
            "initContainers": [{ "name": "migrate", "image": "web:1" }],
        },
    })
}

fn annotated(mut pod: Value, annotations: &[(&str, &str)]) -> Value {
    for (name, value) in annotations {
        pod["metadata"]["annotations"][*name] = json!(value);
    }
    pod
}

fn injected_in(pod: &Value, security: PodSecurity) -> Result<Outcome, Refused> {
    let services = [web_service()];
    super::pod(pod, &settings(), Surroundings { namespace: "shop", security, services: &services })
}

fn changed(pod: &Value, security: PodSecurity) -> Value {
    match injected_in(pod, security).unwrap() {
        Outcome::Changed(changed) => changed,
        Outcome::Untouched(untouched) => panic!("{}", untouched.reason()),
    }
}

fn config(pod: &Value) -> Value {
    serde_json::from_str(annotation(pod, INJECTED_ANNOTATION).unwrap()).unwrap()
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap()).collect()
}

/// Compares with the file of that name, or writes it where `TOMBOLO_GOLDEN` is set.
fn golden(name: &str, value: &Value) {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/inject/golden").join(name);
    let text = serde_saphyr::to_string(value).unwrap();
    if std::env::var_os("TOMBOLO_GOLDEN").is_some() {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, &text).unwrap();
    }
    let want = std::fs::read_to_string(&file).unwrap();
    assert_eq!(text, want, "{name}; TOMBOLO_GOLDEN=1 writes it anew");
}

#[test]
fn whole_pods_are_as_the_files_say() {
    golden("init.yaml", &changed(&web(), PodSecurity::Privileged));
    golden("dns.yaml", &changed(&web(), PodSecurity::Restricted));
    let strict = annotated(web(), &[(PLAINTEXT_ANNOTATION, "strict")]);
    golden("strict.yaml", &changed(&strict, PodSecurity::Privileged));
    let off = annotated(web(), &[(CAPTURE_ANNOTATION, "off")]);
    golden("off.yaml", &changed(&off, PodSecurity::Baseline));
}

#[test]
fn the_sidecar_starts_first_and_everything_else_stays() {
    let pod = changed(&web(), PodSecurity::Privileged);
    assert_eq!(names(&pod["spec"]["initContainers"]), ["tombolo-capture", "tombolo-sidecar", "migrate"]);
    assert_eq!(pod["spec"]["containers"], web()["spec"]["containers"], "probes come in where plaintext may");
    assert_eq!(
        (&pod["metadata"]["labels"], &pod["metadata"]["annotations"]["team"]),
        (&json!({ "app": "web" }), &json!("a"))
    );
    assert_eq!(pod["spec"]["initContainers"][1]["restartPolicy"], "Always");
    let token = &pod["spec"]["volumes"][0]["projected"]["sources"][0]["serviceAccountToken"];
    assert_eq!(token["audience"], "tombolo/west.tombolo");
}

#[test]
fn what_is_served_comes_from_services_that_select_the_pod() {
    let config = config(&changed(&web(), PodSecurity::Privileged));
    let want = json!([
        { "service": "shop/web", "port": 80, "app": "127.0.0.1:8080", "protocol": "http" },
        { "service": "shop/web", "port": 9000, "app": "127.0.0.1:9001", "protocol": "http2" },
    ]);
    assert_eq!(config["services"], want);
    let mut other = web();
    other["metadata"]["labels"]["app"] = json!("api");
    assert_eq!(self::config(&changed(&other, PodSecurity::Privileged)).get("services"), None);
    // A name that no container declares leads nowhere; a Service without a selector is somebody else's.
    let mut nameless = web();
    nameless["spec"]["containers"][0]["ports"][0]["name"] = json!("other");
    let config = self::config(&changed(&nameless, PodSecurity::Privileged));
    assert_eq!(config["services"].as_array().unwrap().len(), 1);
    let unselecting = service(json!({ "metadata": { "name": "x" }, "spec": { "ports": [{ "port": 80 }] } }));
    let around = Surroundings { namespace: "shop", security: PodSecurity::Privileged, services: &[unselecting] };
    let Outcome::Changed(served) = pod(&web(), &settings(), around).unwrap() else { panic!() };
    assert_eq!(self::config(&served).get("services"), None);
}

#[test]
fn capture_is_what_the_namespace_allows_and_the_pod_says() {
    use PodSecurity::{Baseline, Privileged, Restricted};
    for (security, said, want) in [
        (Privileged, None, Ok("init")),
        (Baseline, None, Ok("dns")),
        (Restricted, None, Ok("dns")),
        (Privileged, Some("dns"), Ok("dns")),
        (Privileged, Some("off"), Ok("off")),
        (Baseline, Some("init"), Err("pod security forbids")),
        (Privileged, Some("ebpf"), Err("\"ebpf\" is none of init, dns, off")),
    ] {
        let pod = match said {
            Some(said) => annotated(web(), &[(CAPTURE_ANNOTATION, said)]),
            None => web(),
        };
        let outcome = injected_in(&pod, security);
        match want {
            Err(want) => assert!(outcome.unwrap_err().to_string().contains(want), "{security:?} {said:?}"),
            Ok(want) => {
                let Outcome::Changed(pod) = outcome.unwrap() else { panic!("{security:?} {said:?}") };
                let has_init = names(&pod["spec"]["initContainers"]).contains(&CAPTURE_CONTAINER);
                let asks_sidecar = pod["spec"]["dnsPolicy"] == "None";
                let got = match (has_init, asks_sidecar) {
                    (true, false) => "init",
                    (false, true) => "dns",
                    (false, false) => "off",
                    (true, true) => "both",
                };
                assert_eq!(got, want, "{security:?} {said:?}");
            }
        }
    }
    for (label, want) in
        [(None, Privileged), (Some("baseline"), Baseline), (Some("restricted"), Restricted), (Some("?"), Restricted)]
    {
        assert_eq!(PodSecurity::of_label(label), want, "{label:?}");
    }
}

#[test]
fn names_are_resolved_as_before_where_the_sidecar_is_asked() {
    let mut pod = web();
    pod["spec"]["dnsConfig"] = json!({ "searches": ["corp.example"], "options": [{ "name": "ndots", "value": "2" }] });
    pod["spec"]["securityContext"] =
        json!({ "fsGroup": 7, "sysctls": [{ "name": "net.ipv4.tcp_syncookies", "value": "1" }] });
    let pod = changed(&pod, PodSecurity::Restricted);
    let want = json!({
        "nameservers": ["127.0.0.1"],
        "searches": ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local", "corp.example"],
        "options": [{ "name": "ndots", "value": "2" }],
    });
    assert_eq!(pod["spec"]["dnsConfig"], want);
    assert_eq!(pod["spec"]["securityContext"]["fsGroup"], 7);
    assert_eq!(
        names(&pod["spec"]["securityContext"]["sysctls"]),
        ["net.ipv4.tcp_syncookies", "net.ipv4.ip_unprivileged_port_start"]
    );
    assert_eq!(config(&pod)["dns"]["upstreams"], json!(["10.96.0.10:53"]));
    assert_eq!(config(&pod)["dns"]["loopback"]["exceptPorts"], json!([8080]));
}

#[test]
fn strict_inbound_leaves_probes_and_scraping() {
    let strict = [(PLAINTEXT_ANNOTATION, "strict"), ("prometheus.io/scrape", "true"), ("prometheus.io/port", "9090")];
    let pod = changed(&annotated(web(), &strict), PodSecurity::Privileged);
    let app = &pod["spec"]["containers"][0];
    assert_eq!(app["livenessProbe"]["httpGet"], json!({ "path": "/app/livenessProbe", "port": 15022 }));
    assert_eq!(app["readinessProbe"]["httpGet"], json!({ "path": "/app/readinessProbe", "port": 15022 }));
    assert_eq!((&app["readinessProbe"]["periodSeconds"], app["readinessProbe"].get("tcpSocket")), (&json!(2), None));
    assert_eq!(app["startupProbe"], web()["spec"]["containers"][0]["startupProbe"]);
    let targets = config(&pod)["probes"]["targets"].clone();
    let want = json!([
        { "path": "/app/livenessProbe", "app": "127.0.0.1:8080", "http": { "path": "/healthz" }, "timeout": "3s" },
        { "path": "/app/readinessProbe", "app": "127.0.0.1:8080", "tcp": {}, "timeout": "1s" },
    ]);
    assert_eq!(targets, want);
    let args = pod["spec"]["initContainers"][0]["args"].to_string();
    assert!(args.contains("\"--exclude-inbound-port\",\"9090\"") && args.contains("15008,15020,15022"), "{args}");
    let wrong = annotated(web(), &[(PLAINTEXT_ANNOTATION, "lenient")]);
    assert!(injected_in(&wrong, PodSecurity::Privileged).unwrap_err().to_string().contains("lenient"));
}

#[test]
fn what_has_a_sidecar_or_wants_none_stays() {
    let once = changed(&web(), PodSecurity::Privileged);
    assert_eq!(injected_in(&once, PodSecurity::Privileged), Ok(Outcome::Untouched(Untouched::Already)));
    let mut out = web();
    out["metadata"]["labels"][INJECT_LABEL] = json!("disabled");
    assert_eq!(injected_in(&out, PodSecurity::Privileged), Ok(Outcome::Untouched(Untouched::OptedOut)));
    let mut host = web();
    host["spec"]["hostNetwork"] = json!(true);
    assert_eq!(injected_in(&host, PodSecurity::Privileged), Ok(Outcome::Untouched(Untouched::HostNetwork)));
}

#[test]
fn what_could_not_work_is_refused() {
    let mut user = web();
    user["spec"]["securityContext"] = json!({ "runAsUser": SIDECAR_UID });
    assert_eq!(injected_in(&user, PodSecurity::Privileged), Err(Refused::SidecarUser));
    let mut volume = web();
    volume["spec"]["volumes"] = json!([{ "name": "tombolo", "emptyDir": {} }]);
    assert!(matches!(injected_in(&volume, PodSecurity::Privileged), Err(Refused::Taken(_))));
    for text in ["[a", "just words"] {
        let pod = annotated(web(), &[(CONFIG_ANNOTATION, text)]);
        assert!(matches!(injected_in(&pod, PodSecurity::Privileged), Err(Refused::Config(_))), "{text}");
    }
    for odd in [json!({}), json!({ "spec": [] }), json!({ "spec": { "containers": [], "volumes": 1 } })] {
        assert!(!matches!(injected_in(&odd, PodSecurity::Privileged), Ok(Outcome::Untouched(_))), "{odd}");
    }
}

#[test]
fn the_users_own_fields_win() {
    let pod = annotated(web(), &[(CONFIG_ANNOTATION, "{retry: {tries: 1}, dns: null, capture: {addressesWait: 5s}}")]);
    let config = config(&changed(&pod, PodSecurity::Privileged));
    assert_eq!((&config["retry"], config.get("dns")), (&json!({ "tries": 1 }), None));
    assert_eq!(config["capture"], json!({ "plaintext": "permissive", "addressesWait": "5s" }));
}

#[test]
fn a_patch_makes_of_the_one_what_the_other_is() {
    let before = web();
    let after = changed(&annotated(web(), &[(PLAINTEXT_ANNOTATION, "strict")]), PodSecurity::Privileged);
    let operations = patch::between(&before, &after);
    let mut patched = before;
    for operation in &operations {
        let path = operation["path"].as_str().unwrap();
        let (parent, key) = path.rsplit_once('/').unwrap();
        let key = key.replace("~1", "/").replace("~0", "~");
        let parent = patched.pointer_mut(parent).unwrap().as_object_mut().unwrap();
        match operation["op"].as_str().unwrap() {
            "remove" => drop(parent.remove(&key).unwrap()),
            "add" => assert!(parent.insert(key, operation["value"].clone()).is_none()),
            _ => assert!(parent.insert(key, operation["value"].clone()).is_some()),
        }
    }
    assert_eq!(patched, after);
    let paths: Vec<&str> = operations.iter().map(|operation| operation["path"].as_str().unwrap()).collect();
    assert!(paths.contains(&"/metadata/annotations/tombolo.dev~1injected"), "{paths:?}");
    assert_eq!(patch::between(&after, &after), Vec::<Value>::new());
}

const FILE: &str = "\
# The shop.
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: app, image: web:1}]}
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: nightly, namespace: jobs}
spec: {jobTemplate: {spec: {template: {spec: {restartPolicy: Never, containers: [{name: app, image: job:1}]}}}}}
---
apiVersion: v1
kind: Namespace
metadata: {name: jobs, labels: {pod-security.kubernetes.io/enforce: restricted}}
";

fn values(text: &str) -> Vec<Value> {
    crate::k8s::raw_documents(text).unwrap().into_iter().map(|raw| raw.value).collect()
}

#[test]
fn a_file_is_injected_where_its_objects_have_pods_and_twice_is_once() {
    let inject = |text: &str| manifests(text, &settings(), Some("shop"), PodSecurity::Privileged).unwrap();
    let (once, injected) = inject(FILE);
    let objects: Vec<&str> = injected.iter().map(|injected| injected.object.as_str()).collect();
    assert_eq!(objects, ["Deployment/shop/web", "CronJob/jobs/nightly"]);
    let served = &injected[0].outcome.as_ref().unwrap()["services"][0];
    assert_eq!((&served["service"], &served["app"]), (&json!("shop/web"), &json!("127.0.0.1:8080")));
    assert!(injected[1].outcome.as_ref().unwrap()["dns"].get("loopback").is_some(), "restricted");
    assert!(once.starts_with("# The shop.\napiVersion: v1\nkind: Service\nmetadata: {name: web}\n"), "{once}");
    assert_eq!(values(&once).len(), 4);

    let (twice, untouched) = inject(&once);
    assert_eq!(values(&twice), values(&once));
    assert!(untouched.iter().all(|injected| injected.outcome == Err(Untouched::Already)));
}

#[test]
fn half_a_file_is_never_injected() {
    let text = FILE.replace("{labels: {app: web}}", "{annotations: {tombolo.dev/capture: ebpf}}");
    let wrong = manifests(&text, &settings(), None, PodSecurity::Privileged).unwrap_err();
    assert_eq!((wrong.len(), wrong[0].line), (1, 7), "{wrong:?}");
    assert!(manifests("a: [", &settings(), None, PodSecurity::Privileged).is_err());
}
