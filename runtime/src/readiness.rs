//! Readiness as a set of named conditions: ready only while all hold, and whoever asks is told which
//! one does not and why.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::watch;

use crate::drain::DrainWatch;

type Conditions = BTreeMap<&'static str, Option<String>>;

/// The conditions of one process. Without any, it is ready.
#[derive(Debug, Clone)]
pub struct Readiness {
    conditions: Arc<watch::Sender<Conditions>>,
    drain: DrainWatch,
}

/// One condition; its owner says when it holds. Dropping it leaves it as it was.
#[derive(Debug, Clone)]
pub struct Condition {
    name: &'static str,
    conditions: Arc<watch::Sender<Conditions>>,
}

/// A condition as it is reported: `why_not` is absent while it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConditionState {
    pub name: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why_not: Option<String>,
}

impl Readiness {
    /// Ready when every condition holds and `drain` has not begun.
    pub fn new(drain: DrainWatch) -> Self {
        Self { conditions: Arc::new(watch::Sender::new(Conditions::new())), drain }
    }

    /// Adds a condition that does not hold yet, because of `why_not`.
    pub fn condition(&self, name: &'static str, why_not: impl Into<String>) -> Condition {
        let condition = Condition { name, conditions: self.conditions.clone() };
        condition.fails(why_not);
        condition
    }

    pub fn is_ready(&self) -> bool {
        !self.drain.is_draining() && self.conditions.borrow().values().all(Option::is_none)
    }

    /// Every condition in order of its name; a drain under way shows as a condition that does not hold.
    pub fn states(&self) -> Vec<ConditionState> {
        let mut states: Vec<_> = (self.conditions.borrow().iter())
            .map(|(name, why_not)| ConditionState { name, why_not: why_not.clone() })
            .collect();
        if self.drain.is_draining() {
            states.push(ConditionState { name: "draining", why_not: Some("the process is stopping".into()) });
        }
        states
    }

    /// Resolves when all conditions hold, at once if they do.
    pub async fn ready(&self) {
        let mut conditions = self.conditions.subscribe();
        let all_hold = |conditions: &Conditions| conditions.values().all(Option::is_none);
        conditions.wait_for(all_hold).await.expect("self holds the sender");
    }
}

impl Condition {
    pub fn holds(&self) {
        self.set(None);
    }

    pub fn fails(&self, why_not: impl Into<String>) {
        self.set(Some(why_not.into()));
    }

    fn set(&self, why_not: Option<String>) {
        self.conditions.send_if_modified(|conditions| {
            let before = conditions.insert(self.name, why_not.clone());
            before != Some(why_not)
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test]
    async fn ready_only_while_all_conditions_hold() {
        let readiness = Readiness::new(DrainWatch::never());
        assert!(readiness.is_ready());
        let identity = readiness.condition("identity", "no SVID yet");
        let tunnel = readiness.condition("tunnel", "west does not answer");
        identity.holds();
        assert!(!readiness.is_ready());
        let states = readiness.states();
        assert_eq!(states[0], ConditionState { name: "identity", why_not: None });
        assert_eq!(states[1].why_not.as_deref(), Some("west does not answer"));
        let waiting = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready().await }
        });
        tunnel.holds();
        waiting.await.unwrap();
        tunnel.fails("lost");
        assert!(!readiness.is_ready());
    }

    #[tokio::test]
    async fn a_draining_process_is_not_ready() {
        let (trigger, watch) = crate::drain::drain();
        let readiness = Readiness::new(watch);
        trigger.drain(std::time::Duration::ZERO).await;
        assert!(!readiness.is_ready());
        assert_eq!(readiness.states()[0].name, "draining");
    }
}
