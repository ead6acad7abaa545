//! `tombolo crds`: the definitions of the kinds that tombolo brings along, as YAML.

use anyhow::ensure;
use tombolo_api::k8s::definitions;

use crate::args::CrdsCommand;

pub fn run(command: &CrdsCommand) -> anyhow::Result<()> {
    let mut definitions = definitions();
    if let Some(group) = &command.group {
        definitions.retain(|definition| definition["spec"]["group"] == *group);
        ensure!(!definitions.is_empty(), "tombolo brings along no kind of group {group}; leave --group out to see all");
    }
    for definition in definitions {
        anstream::print!("---\n{}", serde_saphyr::to_string(&definition)?);
    }
    Ok(())
}
