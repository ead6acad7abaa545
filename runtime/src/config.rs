//! One YAML file per process, typed, parsed once. A file that does not validate is refused with file,
//! line, column and reason; every problem of its values is reported at once.

use std::fmt::{self, Display};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Location, Spanned};

/// A configuration above this size is a mistake.
const SIZE_MAX: u64 = 1 << 20;

/// What types can't say about a configuration.
pub trait Validate {
    /// Every problem; none means that it can be run with.
    fn validate(&self) -> Vec<Problem>;
}

/// A value that can be read but not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Its path in the file: `federation.address`, `listeners[0].to`.
    pub field: String,
    pub reason: String,
}

impl Problem {
    pub fn new(field: impl Into<String>, reason: impl Display) -> Self {
        Self { field: field.into(), reason: reason.to_string() }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: larger than {SIZE_MAX} bytes, which no configuration needs", path.display())]
    TooLarge { path: PathBuf },
    /// Never empty. Displayed as one line for each.
    #[error("{}", lines(.0))]
    Invalid(Vec<Complaint>),
}

/// A problem with its place; line and column start at 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    pub path: PathBuf,
    pub line: u64,
    pub column: u64,
    pub reason: String,
}

impl Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}", self.path.display(), self.line, self.column, self.reason)
    }
}

fn lines(complaints: &[Complaint]) -> String {
    complaints.iter().map(Complaint::to_string).collect::<Vec<_>>().join("\n")
}

/// Reads, parses and validates the file at `path`.
pub fn load<T: DeserializeOwned + Validate>(path: &Path) -> Result<T, ConfigError> {
    parse(&read(path)?, path)
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.into(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    let size = file.take(SIZE_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if size as u64 > SIZE_MAX { Err(ConfigError::TooLarge { path: path.into() }) } else { Ok(text) }
}

/// Parses and validates `text`; `path` is what complaints name.
pub fn parse<T: DeserializeOwned + Validate>(text: &str, path: &Path) -> Result<T, ConfigError> {
    let complaint = |location: Option<Location>, reason: String| Complaint {
        path: path.into(),
        line: location.map_or(1, |at| at.line().max(1)),
        column: location.map_or(1, |at| at.column().max(1)),
        reason,
    };
    let config: T =
        from_yaml(text).map_err(|error| ConfigError::Invalid(vec![complaint(error.location(), reason_of(&error))]))?;
    let problems = config.validate();
    if problems.is_empty() {
        return Ok(config);
    }
    let root: Option<Spanned<Node>> = from_yaml(text).ok();
    let complaints = problems.into_iter().map(|problem| {
        let location = root.as_ref().and_then(|root| locate(root, &problem.field));
        complaint(location, format!("{}: {}", problem.field, problem.reason))
    });
    Err(ConfigError::Invalid(complaints.collect()))
}

fn from_yaml<T: DeserializeOwned>(text: &str) -> Result<T, serde_saphyr::Error> {
    // An empty file is an empty mapping, so that a configuration of defaults may be empty.
    let text =
        if text.lines().all(|line| line.trim_start().starts_with('#') || line.trim().is_empty()) { "{}" } else { text };
    let options = serde_saphyr::options! { strict_booleans: true, with_snippet: false };
    serde_saphyr::from_str_with_options(text, options)
}

/// The parser's own words on one line, without the place, which stands in front already.
fn reason_of(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let text = text.split('\n').map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    match error.location() {
        Some(at) => text.replace(&format!(" at line {}, column {}", at.line(), at.column()), ""),
        None => text,
    }
}

/// The shape of a document with the place of each value, to say where a problem is.
enum Node {
    Map(Vec<(String, Spanned<Node>)>),
    List(Vec<Spanned<Node>>),
    Leaf,
}

/// The place of `field`, or of the innermost part of its path that the document has.
fn locate(root: &Spanned<Node>, field: &str) -> Option<Location> {
    let mut at = root;
    for segment in field.split(['.', '[']) {
        let inner = match &at.value {
            Node::Map(entries) => entries.iter().find(|(key, _)| key == segment).map(|(_, node)| node),
            Node::List(items) => segment.trim_end_matches(']').parse().ok().and_then(|n: usize| items.get(n)),
            Node::Leaf => None,
        };
        match inner {
            Some(inner) => at = inner,
            None => break,
        }
    }
    (at.referenced != Location::UNKNOWN).then_some(at.referenced)
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any YAML")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Node::Map(entries))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Leaf)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Leaf)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
        Ok(Node::Leaf)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Leaf)
    }

    fn visit_str<E>(self, _: &str) -> Result<Node, E> {
        Ok(Node::Leaf)
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Leaf)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Leaf)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::time::Duration;

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    struct Sample {
        #[serde(default)]
        name: String,
        #[serde(default, with = "humantime_serde")]
        drain_deadline: Duration,
        #[serde(default)]
        listeners: Vec<Listener>,
        #[serde(default)]
        verbose: bool,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Listener {
        to: String,
    }

    impl Validate for Sample {
        fn validate(&self) -> Vec<Problem> {
            let mut problems = Vec::new();
            if self.name.len() > 4 {
                problems.push(Problem::new("name", "too long"));
            }
            for (n, listener) in self.listeners.iter().enumerate() {
                if !listener.to.contains(':') {
                    problems.push(Problem::new(format!("listeners[{n}].to"), "write host:port"));
                }
            }
            if self.drain_deadline > Duration::from_secs(60) {
                problems.push(Problem::new("drainDeadline", "at most 60s"));
            }
            if self.verbose && self.listeners.is_empty() {
                problems.push(Problem::new("listeners", "needed with verbose"));
            }
            problems
        }
    }

    #[track_caller]
    fn check(text: &str, complaints: &[&str]) {
        let told = match parse::<Sample>(text, Path::new("s.yaml")) {
            Ok(_) => Vec::new(),
            Err(error) => error.to_string().lines().map(str::to_owned).collect(),
        };
        assert_eq!(told.len(), complaints.len(), "{told:#?}");
        for (told, complaint) in told.iter().zip(complaints) {
            let (place, words) = complaint.split_once(' ').unwrap();
            assert!(told.starts_with(place) && told.contains(words), "{told:?} is not {complaint:?}");
        }
    }

    #[test]
    fn complaints_name_file_line_column_and_reason() {
        check("", &[]);
        check("# nothing\n", &[]);
        check("name: a\ndrainDeadline: 10s\nlisteners:\n  - to: db:5432\n", &[]);
        check("name: a\nnmae: b\n", &["s.yaml:2:1: unknown field `nmae`"]);
        check("name: a\nlisteners:\n  - to: x:1\n    too: y\n", &["s.yaml:4:5: unknown field `too`"]);
        check("name: a\ndrainDeadline: soon\n", &["s.yaml:2:1: \"soon\", expected a duration"]);
        check("verbose: yes\n", &["s.yaml:1:10: bool"]);
        check("name: [a\n", &["s.yaml: "]);
        check("name: a\nname: b\n", &["s.yaml:2:1: name"]);
    }

    #[test]
    fn every_bad_value_is_reported_at_its_place() {
        check(
            "name: overlong\nlisteners:\n  - to: db:1\n  - to: db\n",
            &["s.yaml:1:7: name: too long", "s.yaml:4:9: listeners[1].to: write host:port"],
        );
        // A field that is absent is reported at what should hold it.
        check("verbose: true\n", &["s.yaml:1:1: listeners: needed"]);
    }

    #[test]
    fn unreadable_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let absent = folder.path().join("absent.yaml");
        let error = load::<Sample>(&absent).unwrap_err().to_string();
        assert!(error.contains("absent.yaml"), "{error}");
        let huge = folder.path().join("huge.yaml");
        std::fs::write(&huge, "#".repeat(2 << 20)).unwrap();
        assert!(matches!(load::<Sample>(&huge), Err(ConfigError::TooLarge { .. })));
    }
}
