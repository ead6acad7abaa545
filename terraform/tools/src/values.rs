//! What a schema does not say of values, and a real provider checks: which ones an attribute may have, from the models of
//! the clouds' own APIs, and that what the provider computes is not configured.

use std::collections::BTreeMap;

use anyhow::Context as _;
use rmpv::Value;
use serde::Deserialize;

/// By `resource.attribute` or `resource.block.attribute`, the values that the API knows.
#[derive(Deserialize)]
struct Enums {
    values: BTreeMap<String, Vec<String>>,
}

/// Paths are written like those of the enums.
pub struct Rules {
    enums: Enums,
    computed_only: Vec<String>,
}

impl Rules {
    pub fn new(enums: &str, computed_only: Vec<String>) -> anyhow::Result<Self> {
        Ok(Self { enums: serde_json::from_str(enums)?, computed_only })
    }

    /// What is wrong with the configuration of a resource, a sentence for each value. Values that are not known yet
    /// are passed over, and so are attributes that are not set.
    pub fn refused(&self, resource: &str, msgpack: &[u8]) -> anyhow::Result<Vec<String>> {
        let config = rmpv::decode::read_value(&mut &*msgpack).context("MessagePack")?;
        let mut refused = Vec::new();
        for (path, allowed) in &self.enums.values {
            let strings = found(&config, resource, path).into_iter().filter_map(Value::as_str);
            for value in strings.filter(|value| !allowed.iter().any(|known| known == value)) {
                refused.push(format!("{path} is {value:?}; the API knows {}.", allowed.join(", ")));
            }
        }
        for path in self.computed_only.iter().filter(|path| !found(&config, resource, path).is_empty()) {
            refused.push(format!("{path} is set; its value is decided by the provider."));
        }
        Ok(refused)
    }
}

/// Every value at `path` inside the configuration of `resource`, in each item of the lists on the way.
fn found<'a>(config: &'a Value, resource: &str, path: &str) -> Vec<&'a Value> {
    let mut values = Vec::new();
    if let Some(inside) = path.strip_prefix(resource).and_then(|rest| rest.strip_prefix('.')) {
        collect(config, inside, &mut values);
    }
    values
}

fn collect<'a>(value: &'a Value, path: &str, values: &mut Vec<&'a Value>) {
    match value {
        Value::Nil => {}
        _ if path.is_empty() => values.push(value),
        Value::Array(items) => items.iter().for_each(|item| collect(item, path, values)),
        Value::Map(fields) => {
            let (name, rest) = path.split_once('.').unwrap_or((path, ""));
            let fields = fields.iter().filter(|(key, _)| key.as_str() == Some(name));
            fields.for_each(|(_, value)| collect(value, rest, values));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn refused(resource: &str, config: &Value) -> Vec<String> {
        let json = r#"{"values": {"vm.kind": ["a", "b"], "vm.disk.type": ["ssd"], "vm2.kind": ["c"]}}"#;
        let mut msgpack = Vec::new();
        rmpv::encode::write_value(&mut msgpack, config).unwrap();
        Rules::new(json, vec!["vm.arn".into()]).unwrap().refused(resource, &msgpack).unwrap()
    }

    fn object(fields: &[(&str, Value)]) -> Value {
        Value::Map(fields.iter().map(|(name, value)| (Value::from(*name), value.clone())).collect())
    }

    #[test]
    fn only_a_known_wrong_value_is_refused() {
        let unknown = Value::Ext(0, vec![0]);
        for (kind, wrong) in [("a".into(), 0), ("c".into(), 1), (Value::Nil, 0), (unknown, 0)] {
            assert_eq!(refused("vm", &object(&[("kind", kind)])).len(), wrong);
        }
        let wrong = refused("vm", &object(&[("kind", "c".into())]));
        assert_eq!(wrong, ["vm.kind is \"c\"; the API knows a, b."]);
    }

    #[test]
    fn what_the_provider_decides_can_not_be_set() {
        assert!(refused("vm", &object(&[("arn", Value::Nil)])).is_empty());
        assert_eq!(
            refused("vm", &object(&[("arn", "x".into())])),
            ["vm.arn is set; its value is decided by the provider."]
        );
    }

    #[test]
    fn every_item_of_a_nested_block_is_looked_at() {
        let disks = Value::Array(vec![
            object(&[("type", "ssd".into())]),
            object(&[("type", "tape".into())]),
            object(&[("type", "drum".into())]),
        ]);
        assert_eq!(refused("vm", &object(&[("disk", disks)])).len(), 2);
    }
}
