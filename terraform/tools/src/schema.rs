//! From the shape of `terraform providers schema -json` to the plugin protocol's.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;

use crate::proto::get_provider_schema::Response;
use crate::proto::schema::nested_block::NestingMode;
use crate::proto::schema::object;
use crate::proto::{Schema, schema};

#[derive(Deserialize)]
struct Document {
    provider_schemas: BTreeMap<String, ProviderJson>,
}

#[derive(Deserialize)]
struct ProviderJson {
    provider: SchemaJson,
    resource_schemas: BTreeMap<String, SchemaJson>,
}

#[derive(Deserialize)]
struct SchemaJson {
    version: i64,
    block: BlockJson,
}

#[derive(Deserialize)]
struct BlockJson {
    #[serde(default)]
    attributes: BTreeMap<String, AttributeJson>,
    #[serde(default)]
    block_types: BTreeMap<String, NestedJson>,
}

#[derive(Deserialize)]
struct AttributeJson {
    r#type: Option<serde_json::Value>,
    nested_type: Option<ObjectJson>,
    #[serde(default)]
    required: bool,
    #[serde(default)]
    optional: bool,
    #[serde(default)]
    computed: bool,
    #[serde(default)]
    write_only: bool,
}

/// An attribute with attributes of its own, written `name = {...}`.
#[derive(Deserialize)]
struct ObjectJson {
    nesting_mode: String,
    attributes: BTreeMap<String, AttributeJson>,
}

#[derive(Deserialize)]
struct NestedJson {
    nesting_mode: String,
    block: BlockJson,
    #[serde(default)]
    min_items: i64,
    #[serde(default)]
    max_items: i64,
}

/// The one provider of the document.
pub fn read(text: &str) -> anyhow::Result<Response> {
    let document: Document = serde_json::from_str(text)?;
    ensure!(document.provider_schemas.len() == 1, "it must describe one provider");
    let (_, provider) = document.provider_schemas.into_iter().next().context("one provider")?;
    let resources = provider.resource_schemas.into_iter();
    Ok(Response {
        provider: Some(schema_of(provider.provider)?),
        resource_schemas: resources.map(|(name, json)| Ok((name, schema_of(json)?))).collect::<anyhow::Result<_>>()?,
    })
}

/// Paths of what no configuration may set, as `resource.attribute` or `resource.block.attribute`.
pub fn computed_only(schemas: &Response) -> Vec<String> {
    let mut paths = Vec::new();
    for (name, schema) in &schemas.resource_schemas {
        schema.block.iter().for_each(|block| add_computed_only(name, block, &mut paths));
    }
    paths.sort();
    paths
}

fn add_computed_only(path: &str, block: &schema::Block, paths: &mut Vec<String>) {
    let only = block.attributes.iter().filter(|attribute| attribute.computed && !attribute.optional);
    paths.extend(only.map(|attribute| format!("{path}.{}", attribute.name)));
    for nested in &block.block_types {
        nested.block.iter().for_each(|block| add_computed_only(&format!("{path}.{}", nested.type_name), block, paths));
    }
}

fn schema_of(json: SchemaJson) -> anyhow::Result<Schema> {
    Ok(Schema { version: json.version, block: Some(block_of(json.block)?) })
}

fn block_of(json: BlockJson) -> anyhow::Result<schema::Block> {
    let blocks = json.block_types.into_iter().map(|(type_name, nested)| {
        let nesting = match nested.nesting_mode.as_str() {
            "single" => NestingMode::Single,
            "list" => NestingMode::List,
            "set" => NestingMode::Set,
            "map" => NestingMode::Map,
            other => bail!("{type_name}: unknown nesting mode {other:?}"),
        };
        Ok(schema::NestedBlock {
            type_name,
            block: Some(block_of(nested.block)?),
            nesting: nesting.into(),
            min_items: nested.min_items,
            max_items: nested.max_items,
        })
    });
    Ok(schema::Block {
        version: 0,
        attributes: attributes_of(json.attributes)?,
        block_types: blocks.collect::<anyhow::Result<_>>()?,
    })
}

fn attributes_of(attributes: BTreeMap<String, AttributeJson>) -> anyhow::Result<Vec<schema::Attribute>> {
    let attributes = attributes.into_iter().map(|(name, attribute)| {
        let nested = attribute.nested_type.map(object_of).transpose().with_context(|| name.clone())?;
        ensure!(attribute.r#type.is_some() != nested.is_some(), "{name}: it must have a type or a nested type");
        Ok(schema::Attribute {
            name,
            r#type: attribute.r#type.map(|json| json.to_string().into_bytes()).unwrap_or_default(),
            nested_type: nested,
            required: attribute.required,
            optional: attribute.optional,
            computed: attribute.computed,
            write_only: attribute.write_only,
        })
    });
    attributes.collect()
}

fn object_of(json: ObjectJson) -> anyhow::Result<schema::Object> {
    let nesting = match json.nesting_mode.as_str() {
        "single" => object::NestingMode::Single,
        "list" => object::NestingMode::List,
        "set" => object::NestingMode::Set,
        "map" => object::NestingMode::Map,
        other => bail!("unknown nesting mode {other:?}"),
    };
    Ok(schema::Object { attributes: attributes_of(json.attributes)?, nesting: nesting.into() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn document(block: &str) -> String {
        let provider =
            r#"{"provider": {"version": 0, "block": {}}, "resource_schemas": {"x_y": {"version": 3, "block": BLOCK}}}"#;
        format!(r#"{{"provider_schemas": {{"host/name/x": {}}}}}"#, provider.replace("BLOCK", block))
    }

    #[test]
    fn attributes_keep_their_types_and_blocks_their_bounds() {
        let block = r#"{"attributes": {"ids": {"type": ["set", "string"], "required": true}},
            "block_types": {"rule": {"nesting_mode": "list", "max_items": 1, "block": {}}}}"#;
        let response = read(&document(block)).unwrap();
        let schema = &response.resource_schemas["x_y"];
        let block = schema.block.as_ref().unwrap();
        assert_eq!(schema.version, 3);
        assert_eq!(block.attributes[0].r#type, br#"["set","string"]"#);
        assert!(block.attributes[0].required && !block.attributes[0].computed);
        assert_eq!((block.block_types[0].nesting(), block.block_types[0].max_items), (NestingMode::List, 1));
    }

    #[test]
    fn what_only_the_provider_decides_is_found_in_blocks_too() {
        let block = r#"{"attributes": {"id": {"type": "string", "computed": true, "optional": true}},
            "block_types": {"disk": {"nesting_mode": "list", "block": {"attributes": {"name": {"type": "string", "computed": true}}}}}}"#;
        assert_eq!(computed_only(&read(&document(block)).unwrap()), ["x_y.disk.name"]);
    }

    #[test]
    fn nested_attributes_are_attributes() {
        let block = r#"{"attributes": {"set": {"optional": true, "nested_type": {"nesting_mode": "list",
            "attributes": {"name": {"type": "string", "required": true}}}}}}"#;
        let response = read(&document(block)).unwrap();
        let attribute = &response.resource_schemas["x_y"].block.as_ref().unwrap().attributes[0];
        let nested = attribute.nested_type.as_ref().unwrap();
        assert_eq!((attribute.r#type.is_empty(), nested.nesting()), (true, object::NestingMode::List));
        assert!(nested.attributes[0].required);
        let neither = read(&document(r#"{"attributes": {"set": {"optional": true}}}"#)).unwrap_err().to_string();
        assert!(neither.contains("set: it must have a type"), "{neither}");
    }

    #[test]
    fn a_nesting_mode_that_is_not_known_is_named() {
        let block = r#"{"block_types": {"rule": {"nesting_mode": "tree", "block": {}}}}"#;
        assert!(read(&document(block)).unwrap_err().to_string().contains("rule: unknown nesting mode \"tree\""));
        let nested = r#"{"attributes": {"rule": {"nested_type": {"nesting_mode": "tree", "attributes": {}}}}}"#;
        let error = format!("{:#}", read(&document(nested)).unwrap_err());
        assert!(error.contains("rule: unknown nesting mode \"tree\""), "{error}");
    }
}
