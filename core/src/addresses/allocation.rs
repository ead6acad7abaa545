//! Who holds which number. Nobody shares one, whoever is known keeps it, and one that was given back rests for a day
//! before somebody else gets it, so that a client which still has it in a cache reaches nobody, not somebody else.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Number;
use super::mesh::Holder;
use super::ports::PortOwner;
use crate::catalog::ServiceView;
use crate::id::{ClusterId, EndpointId, ServiceName};
use crate::model::ServiceKind;

/// How long a number that was given back rests.
pub const QUARANTINE: SignedDuration = SignedDuration::from_hours(24);

/// What a number is for: a service, or one endpoint of a headless service.
/// Written `namespace/name` and `namespace/name@cluster/endpoint`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    pub service: ServiceName,
    pub endpoint: Option<(ClusterId, EndpointId)>,
}

impl Owner {
    pub fn service(service: ServiceName) -> Self {
        Self { service, endpoint: None }
    }

    pub fn holder(&self) -> Holder {
        if self.endpoint.is_some() { Holder::Endpoint } else { Holder::Service }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.service)?;
        match &self.endpoint {
            Some((cluster, endpoint)) => write!(f, "@{cluster}/{endpoint}"),
            None => Ok(()),
        }
    }
}

/// A text that is no owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write namespace/name or namespace/name@cluster/endpoint")]
pub struct InvalidOwner;

impl FromStr for Owner {
    type Err = InvalidOwner;

    fn from_str(text: &str) -> Result<Self, InvalidOwner> {
        let Some((service, endpoint)) = text.split_once('@') else {
            return Ok(Self::service(text.parse().map_err(|_| InvalidOwner)?));
        };
        let (cluster, endpoint) = endpoint.split_once('/').ok_or(InvalidOwner)?;
        let endpoint = (cluster.parse().map_err(|_| InvalidOwner)?, endpoint.parse().map_err(|_| InvalidOwner)?);
        Ok(Self { service: service.parse().map_err(|_| InvalidOwner)?, endpoint: Some(endpoint) })
    }
}

impl Serialize for Owner {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Owner {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A service is headless when every cluster that has it says so.
pub fn is_headless(view: &ServiceView) -> bool {
    view.shares.iter().all(|share| share.export.kind == ServiceKind::Headless)
}

/// Everything in a service that needs a number.
pub fn owners(view: &ServiceView) -> impl Iterator<Item = Owner> {
    let headless = is_headless(view);
    let whole = (!headless && !view.shares.is_empty()).then(|| Owner::service(view.service.clone()));
    let endpoints = view.shares.iter().filter(move |_| headless).flat_map(|share| {
        let owner = |endpoint: &EndpointId| Owner {
            service: view.service.clone(),
            endpoint: Some((share.cluster.clone(), endpoint.clone())),
        };
        share.export.endpoints.keys().map(owner)
    });
    whole.into_iter().chain(endpoints)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    number: Number,
    /// When it was given back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gone: Option<Timestamp>,
}

/// Numbers of one kind that are held or rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", bound(deserialize = "O: Deserialize<'de> + Ord"))]
pub struct Table<O> {
    held: BTreeMap<O, Held>,
    /// The number handed out last: the search goes on behind it, so that those given back are the last to be used again.
    last: u32,
}

impl<O> Default for Table<O> {
    fn default() -> Self {
        Self { held: BTreeMap::new(), last: 0 }
    }
}

impl<O: Ord + Clone + fmt::Display> Table<O> {
    /// Makes exactly `wanted` hold numbers below `count`. Returns the owners for whom there was none left; they get one
    /// as soon as there is.
    pub fn observe(&mut self, wanted: &BTreeSet<O>, count: u32, now: Timestamp) -> BTreeSet<O> {
        self.held.retain(|_, held| held.number.0 < count && !held.has_rested(now));
        for (owner, held) in &mut self.held {
            held.gone = if wanted.contains(owner) { None } else { held.gone.or(Some(now)) };
        }
        let new: Vec<&O> = wanted.iter().filter(|owner| !self.held.contains_key(*owner)).collect();
        if new.is_empty() {
            return BTreeSet::new();
        }
        let taken: BTreeSet<u32> = self.held.values().map(|held| held.number.0).collect();
        let after = (self.last + 1..count).chain(1..(self.last + 1).min(count));
        let mut free = after.filter(|number| !taken.contains(number));
        let mut without = BTreeSet::new();
        for owner in new {
            let Some(number) = free.next() else {
                without.insert(owner.clone());
                continue;
            };
            self.held.insert(owner.clone(), Held { number: Number(number), gone: None });
            self.last = number;
        }
        without
    }

    pub fn number(&self, owner: &O) -> Option<Number> {
        self.held.get(owner).filter(|held| held.gone.is_none()).map(|held| held.number)
    }

    /// Numbers in use, without those that rest.
    pub fn in_use(&self) -> impl Iterator<Item = (&O, Number)> {
        self.held.iter().filter(|(_, held)| held.gone.is_none()).map(|(owner, held)| (owner, held.number))
    }

    /// Numbers that rest.
    pub fn resting(&self) -> usize {
        self.held.values().filter(|held| held.gone.is_some()).count()
    }

    fn check(&self) -> Result<(), String> {
        let mut seen = BTreeMap::new();
        for (owner, held) in &self.held {
            if held.number.0 == 0 {
                return Err(format!("{owner} has the number 0"));
            }
            if let Some(other) = seen.insert(held.number, owner) {
                return Err(format!("{owner} and {other} have the same number {}", held.number.0));
            }
        }
        Ok(())
    }

    fn is_unused(&self) -> bool {
        self.held.is_empty() && self.last == 0
    }
}

/// All numbers that are held or rest. This is what has to be durable before anybody is told.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Allocations {
    #[serde(flatten)]
    pub addresses: Table<Owner>,
    /// Of gateways' listeners for workloads without a sidecar.
    #[serde(default, skip_serializing_if = "Table::is_unused")]
    pub listeners: Table<PortOwner>,
}

impl Allocations {
    /// Why this can't be a state that was ever written; nothing when it can.
    pub fn check(&self) -> Result<(), String> {
        self.addresses.check().and_then(|()| self.listeners.check())
    }
}

impl Held {
    fn has_rested(&self, now: Timestamp) -> bool {
        self.gone.is_some_and(|gone| now.duration_since(gone) >= QUARANTINE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addresses::Ranges;
    use proptest::prelude::*;

    fn at(hours: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + hours * 3600).unwrap()
    }

    fn set(names: &[&str]) -> BTreeSet<Owner> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn number(held: &Allocations, name: &str) -> Option<u32> {
        held.addresses.number(&name.parse().unwrap()).map(|number| number.0)
    }

    #[test]
    fn owners_are_read_back() {
        for text in ["shop/web", "shop/db@east/e1"] {
            assert_eq!(text.parse::<Owner>().unwrap().to_string(), text);
        }
        for text in ["", "web", "shop/db@east", "shop/db@/e", "shop/db@EAST/e"] {
            assert!(text.parse::<Owner>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_was_given_back_rests_for_a_day() {
        let ranges = Ranges { ipv4: "240.1.0.0/28".parse().unwrap(), ..Ranges::default() };
        let mut held = Allocations::default();
        assert!(held.addresses.observe(&set(&["a/web", "a/db"]), ranges.count(), at(0)).is_empty());
        assert_eq!((number(&held, "a/db"), number(&held, "a/web")), (Some(1), Some(2)));
        held.addresses.observe(&set(&["a/db"]), ranges.count(), at(1));
        assert_eq!((number(&held, "a/web"), held.addresses.resting()), (None, 1));
        // It comes back within the day, and has the number that it had.
        held.addresses.observe(&set(&["a/db", "a/web"]), ranges.count(), at(20));
        assert_eq!(number(&held, "a/web"), Some(2));
        held.addresses.observe(&set(&["a/db"]), ranges.count(), at(21));
        // The others go round the rest of the range, and the resting number is not among what they get.
        let many: Vec<String> = (0..14).map(|n| format!("b/web-{n:02}")).collect();
        let mut wanted: Vec<&str> = many.iter().map(String::as_str).collect();
        wanted.push("a/db");
        let without = held.addresses.observe(&set(&wanted), ranges.count(), at(44));
        assert_eq!(without, set(&["b/web-13"]));
        assert!(held.addresses.in_use().all(|(_, number)| number.0 != 2));
        let without = held.addresses.observe(&set(&wanted), ranges.count(), at(45));
        assert!(without.is_empty());
        assert_eq!(number(&held, "b/web-13"), Some(2));
    }

    #[test]
    fn a_smaller_range_takes_numbers_away_and_gives_others() {
        let mut held = Allocations::default();
        let many: Vec<String> = (0..30).map(|n| format!("b/web-{n:02}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        held.addresses.observe(&set(&many), Ranges::default().count(), at(0));
        let small = Ranges { ipv4: "240.1.0.0/28".parse().unwrap(), ..Ranges::default() };
        assert_eq!(held.addresses.observe(&set(&many), small.count(), at(1)).len(), 15);
        assert!(held.addresses.in_use().all(|(_, number)| (1..16).contains(&number.0)));
    }

    #[test]
    fn a_state_with_a_number_twice_was_never_written() {
        let text = r#"{"held": {"a/web": {"number": 1}, "a/db": {"number": 1}}, "last": 1}"#;
        let held: Allocations = serde_json::from_str(text).unwrap();
        assert!(held.check().unwrap_err().contains("same number 1"));
        let held: Allocations = serde_json::from_str(r#"{"held": {"a/web": {"number": 0}}, "last": 1}"#).unwrap();
        assert!(held.check().is_err());
    }

    proptest! {
        /// Over any history, with restarts anywhere: no two share a number, whoever stays keeps theirs, and none
        /// changes hands within a day.
        #[test]
        fn numbers_are_unique_stable_and_rest(
            steps in proptest::collection::vec(
                (proptest::collection::btree_set(0_u8..24, 0..20), 0_i64..30, any::<bool>()), 1..30),
        ) {
            let ranges = Ranges { ipv4: "240.1.0.0/28".parse().unwrap(), ..Ranges::default() };
            let mut held = Allocations::default();
            let mut hour = 0;
            let mut last_use: BTreeMap<u32, (Owner, i64)> = BTreeMap::new();
            let mut before: BTreeMap<Owner, u32> = BTreeMap::new();
            for (wanted, hours, restart) in steps {
                hour += hours;
                let wanted: BTreeSet<Owner> =
                    wanted.iter().map(|n| format!("ns/web-{n}").parse().unwrap()).collect();
                let without = held.addresses.observe(&wanted, ranges.count(), at(hour));
                if restart {
                    held = serde_json::from_str(&serde_json::to_string(&held).unwrap()).unwrap();
                }
                held.check().unwrap();
                let now: BTreeMap<Owner, u32> =
                    held.addresses.in_use().map(|(owner, number)| (owner.clone(), number.0)).collect();
                prop_assert_eq!(now.len() + without.len(), wanted.len());
                // Nobody goes without while a number neither is in use nor rests.
                prop_assert!(without.is_empty() || now.len() + held.addresses.resting() == 15);
                for (owner, number) in &now {
                    prop_assert!((1..16).contains(number));
                    if let Some(before) = before.get(owner) {
                        prop_assert_eq!(before, number);
                    }
                    if let Some((other, used)) = last_use.get(number) {
                        prop_assert!(other == owner || hour - used >= 24, "{other} {owner} {hour} {used}");
                    }
                }
                // A number is in use until the step at which it is given back.
                for (owner, number) in before.iter().chain(&now) {
                    if now.get(owner) == Some(number) || !now.values().any(|held| held == number) {
                        last_use.insert(*number, (owner.clone(), hour));
                    }
                }
                before = now;
            }
        }
    }
}
