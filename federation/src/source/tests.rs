use std::fs;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant, SystemTime};

use tempfile::TempDir;
use tombolo_core::policy::access::AccessSpec;
use tombolo_core::policy::set::Policy;
use tombolo_core::source::SourceProblem;

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

fn service(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: shop\n  annotations: {{tombolo.dev/service-accounts: {name}}}\nspec:\n  ports: [{{name: http, port: {port}}}]\n"
    )
}

fn exported_by_hand(name: &str) -> String {
    format!(
        "---\napiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata: {{name: {name}, namespace: shop}}\n"
    )
}

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

fn store(state: &TempDir) -> Store {
    let (cluster, domain) = ("east".parse().unwrap(), "east.tombolo".parse().unwrap());
    Store::open(state.path(), &cluster, &domain, Timestamp::now()).unwrap()
}

/// A directory with nothing but what a test writes, and a source that watches it.
struct Running {
    folder: TempDir,
    _state: TempDir,
    source: SourceHandle,
}

impl Running {
    async fn with(files: &[(&str, &str)]) -> Self {
        let (folder, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (file, content) in files {
            fs::write(folder.path().join(file), content).unwrap();
        }
        let settings = SourceSettings {
            directory: folder.path().into(),
            cluster: "east".parse().unwrap(),
            trust_domain: "east.tombolo".parse().unwrap(),
        };
        let source = start(settings, store(&state)).await;
        Self { folder, _state: state, source }
    }

    fn write(&self, file: &str, content: &str) {
        fs::write(self.folder.path().join(file), content).unwrap();
    }

    async fn until(&self, what: &str, condition: impl Fn(&LocalState) -> bool) -> Arc<LocalState> {
        let mut state = self.source.state();
        let reached = tokio::time::timeout(DEADLINE, state.wait_for(|state| condition(state))).await;
        match reached {
            Ok(state) => state.unwrap().clone(),
            Err(_) => panic!("not within {DEADLINE:?}: {what}; last: {:?}", self.source.state().borrow()),
        }
    }
}

fn port_of(state: &LocalState, service: &str) -> Option<u16> {
    state.services.get(&name(service)).and_then(|service| service.ports.first()).map(|port| port.port)
}

#[tokio::test]
async fn an_edit_takes_effect_at_once_and_a_bad_one_not_at_all() {
    let running = Running::with(&[("web.yaml", &service("web", 80)), ("note.txt", "not: [yaml")]).await;
    assert_eq!(port_of(&running.source.state().borrow(), "shop/web"), Some(80), "read before it is told to be running");

    running.write("web.yaml", &service("web", 81));
    running.until("the edit", |state| port_of(state, "shop/web") == Some(81)).await;

    running.write("web.yaml", &service("web", 82).replace("port: 82", "port: eighty"));
    let state = running.until("the problem", |state| !state.problems.is_empty()).await;
    assert_eq!(port_of(&state, "shop/web"), Some(81), "the last good content stays in force");
    let SourceProblem { file, line, reason } = &state.problems[0];
    assert_eq!((file.as_str(), *line), ("web.yaml", 8));
    assert!(reason.ends_with("(its last good content stays in force)"), "{reason}");

    let staged = running.folder.path().join(".web.yaml.swp");
    fs::write(&staged, service("web", 83)).unwrap();
    fs::rename(&staged, running.folder.path().join("web.yaml")).unwrap();
    let replaced = |state: &LocalState| port_of(state, "shop/web") == Some(83) && state.problems.is_empty();
    running.until("the replaced file", replaced).await;

    fs::remove_file(running.folder.path().join("web.yaml")).unwrap();
    running.until("the removal", |state| state.services.is_empty()).await;
}

#[tokio::test]
async fn an_access_policy_that_was_never_good_closes_what_it_names_until_it_is_mended() {
    let policy = |name: &str, spec: &str| {
        format!(
            "---\napiVersion: tombolo.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n"
        )
    };
    let web = "targetRefs: [{kind: Service, name: web}]";
    let broken = policy("web", &format!("{{{web}, rulez: []}}"));
    let audit = policy("audit", "{mode: audit, rulez: []}");
    let running = Running::with(&[("access.yaml", &format!("{broken}{audit}"))]).await;
    let state = running.until("the problem", |state| !state.problems.is_empty()).await;
    assert!(state.problems[0].reason.contains("refuses every caller"), "{:?}", state.problems);
    let closes = |state: &LocalState, service: &str| {
        let delivered = state.policies.delivered(&name(service));
        delivered.iter().any(|one| matches!(one, Policy::Access(access) if access.spec == AccessSpec::closed()))
    };
    assert_eq!((closes(&state, "shop/web"), closes(&state, "shop/db")), (true, false));

    // Whom it is for can't be read either: all of the namespace.
    running.write("access.yaml", &policy("web", "{targetRefs: web}"));
    running.until("the namespace to be closed", |state| closes(state, "shop/db")).await;

    running.write("access.yaml", &policy("web", &format!("{{{web}, rules: []}}")));
    let state = running.until("it to be mended", |state| state.problems.is_empty()).await;
    assert_eq!((closes(&state, "shop/web"), closes(&state, "shop/db"), state.policies.len()), (false, false, 1));
}

#[tokio::test]
async fn new_folders_are_read_and_watched() {
    let running = Running::with(&[]).await;
    fs::create_dir_all(running.folder.path().join("a/b")).unwrap();
    running.write("a/b/web.yml", &service("web", 80));
    running.until("the new folder", |state| port_of(state, "shop/web") == Some(80)).await;
    running.write("a/b/web.yml", &service("web", 81));
    running.until("an edit in it", |state| port_of(state, "shop/web") == Some(81)).await;
}

#[tokio::test]
async fn a_directory_that_vanishes_leaves_its_last_content_in_force() {
    let running = Running::with(&[("web.yaml", &service("web", 80))]).await;
    let aside = running.folder.path().with_extension("aside");
    fs::rename(running.folder.path(), &aside).unwrap();
    let state = running.until("the problem", |state| !state.problems.is_empty()).await;
    assert_eq!(port_of(&state, "shop/web"), Some(80));
    fs::rename(&aside, running.folder.path()).unwrap();
    running.write("web.yaml", &service("web", 81));
    running.until("its return", |state| port_of(state, "shop/web") == Some(81) && state.problems.is_empty()).await;
}

#[tokio::test]
async fn export_writes_a_file_and_unexport_removes_it() {
    let running = Running::with(&[]).await;
    let error = running.source.export(name("shop/web")).await.unwrap_err().to_string();
    assert!(error.starts_with("no Service shop/web is declared in /"), "{error}");

    running.write("web.yaml", &service("web", 80));
    let exported = running.source.export(name("shop/web")).await.unwrap();
    assert_eq!(exported, Exported { file: "exports/shop.web.yaml".into(), already: false });
    let first = running.source.state().borrow().services[&name("shop/web")].exported;
    assert!(first.is_some(), "in force when the command returns");
    let again = running.source.export(name("shop/web")).await.unwrap();
    assert_eq!(again, Exported { file: "exports/shop.web.yaml".into(), already: true });
    let text = fs::read_to_string(running.folder.path().join("exports/shop.web.yaml")).unwrap();
    assert!(text.starts_with("# Written by tombolo export; "), "{text}");

    assert_eq!(running.source.unexport(name("shop/web")).await.unwrap(), "exports/shop.web.yaml");
    assert_eq!(running.source.state().borrow().services[&name("shop/web")].exported, None);
    let error = running.source.unexport(name("shop/web")).await.unwrap_err().to_string();
    assert_eq!(error, "shop/web is not exported");

    running.source.export(name("shop/web")).await.unwrap();
    let second = running.source.state().borrow().services[&name("shop/web")].exported;
    assert_eq!(first, second, "an export that comes back at once is as old as it was");
}

#[tokio::test]
async fn files_written_by_hand_are_never_touched() {
    let by_hand = service("web", 80) + &exported_by_hand("web");
    let running = Running::with(&[("web.yaml", &by_hand), ("db.yaml", &service("db", 5432))]).await;
    let exported = running.source.export(name("shop/web")).await.unwrap();
    assert_eq!(exported, Exported { file: "web.yaml".into(), already: true });
    let error = running.source.unexport(name("shop/web")).await.unwrap_err().to_string();
    assert_eq!(error, "shop/web is exported by web.yaml:10, which was written by hand; remove its ServiceExport there");

    fs::create_dir(running.folder.path().join("exports")).unwrap();
    running.write("exports/shop.db.yaml", "# mine\n");
    let error = running.source.export(name("shop/db")).await.unwrap_err().to_string();
    assert!(error.contains("exports/shop.db.yaml exists and was not written by `tombolo export`"), "{error}");

    fs::remove_file(running.folder.path().join("exports/shop.db.yaml")).unwrap();
    running.source.export(name("shop/db")).await.unwrap();
    let file = running.folder.path().join("exports/shop.db.yaml");
    let added = fs::read_to_string(&file).unwrap() + "# a note of mine\n";
    fs::write(&file, &added).unwrap();
    let error = running.source.unexport(name("shop/db")).await.unwrap_err().to_string();
    assert!(error.contains("was changed since"), "{error}");
    assert_eq!(fs::read_to_string(&file).unwrap(), added);
}

#[tokio::test]
async fn what_can_not_be_exported_says_why() {
    let alias = "apiVersion: v1\nkind: Service\nmetadata: {name: alias, namespace: shop}\nspec: {type: ExternalName, externalName: a.example}\n";
    let running = Running::with(&[("alias.yaml", alias)]).await;
    let error = running.source.export(name("shop/alias")).await.unwrap_err().to_string();
    assert!(error.contains("InvalidServiceType"), "{error}");
    let error = running.source.export(name("tombolo-system/federation")).await.unwrap_err().to_string();
    assert!(error.starts_with("namespace tombolo-system"), "{error}");
}

fn scan(directory: &mut Directory, now: Instant) -> Reading {
    directory.scan(now, SystemTime::now())
}

#[test]
fn an_emptied_file_keeps_its_content_until_it_is_meant() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("web.yaml");
    let mut directory = Directory::new(folder.path().into(), "east".parse().unwrap());
    let now = Instant::now();
    fs::write(&file, service("web", 80)).unwrap();
    assert_eq!(scan(&mut directory, now).objects.len(), 1);
    fs::write(&file, "").unwrap();
    let reading = scan(&mut directory, now);
    assert_eq!(reading.objects.len(), 1, "many programs empty a file before they write it");
    assert_eq!(reading.again, Some(directory::EMPTY_AFTER));
    let reading = scan(&mut directory, now + directory::EMPTY_AFTER);
    assert_eq!((reading.objects.len(), reading.again), (0, None));
}

#[test]
fn odd_entries_neither_hold_up_nor_confuse_the_scan() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("sub")).unwrap();
    symlink("..", path("sub/loop")).unwrap();
    symlink("nowhere", path("dangling.yaml")).unwrap();
    nix::unistd::mkfifo(&path("pipe.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::write(path("binary.yaml"), [0xff, 0xfe, 0x00]).unwrap();
    fs::write(path("large.yaml"), vec![b'#'; directory::FILE_OCTETS_MAX as usize + 1]).unwrap();
    fs::create_dir(path("..data")).unwrap();
    fs::write(path("..data/web.yaml"), service("web", 80)).unwrap();
    symlink("..data/web.yaml", path("web.yaml")).unwrap();
    let reading = scan(&mut Directory::new(folder.path().into(), "east".parse().unwrap()), Instant::now());
    assert_eq!(reading.objects.len(), 1, "a linked file is read once: {reading:?}");
    let problems: BTreeSet<_> = reading.problems.iter().map(|problem| problem.file.as_str()).collect();
    assert_eq!(problems, ["binary.yaml", "dangling.yaml", "large.yaml", "pipe.yaml"].into());
}

#[test]
fn the_number_of_files_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    for n in 0..directory::FILES_MAX + 10 {
        fs::write(folder.path().join(format!("{n:05}.yaml")), "").unwrap();
    }
    let reading = scan(&mut Directory::new(folder.path().into(), "east".parse().unwrap()), Instant::now());
    assert_eq!(reading.problems.len(), 1);
    assert_eq!(reading.problems[0].file, format!("{:05}.yaml", directory::FILES_MAX));
}

#[test]
fn endpoint_ids_tell_apart_what_differs_and_show_nothing() {
    let (east, west) = ("east".parse().unwrap(), "west".parse().unwrap());
    let ids: BTreeSet<_> = [
        endpoint_id(&east, &name("shop/web"), "a"),
        endpoint_id(&east, &name("shop/web"), "b"),
        endpoint_id(&east, &name("shop/db"), "a"),
        endpoint_id(&west, &name("shop/web"), "a"),
    ]
    .into();
    assert_eq!(ids.len(), 4);
    assert!(ids.iter().all(|id| id.as_str().len() == 16));
}
