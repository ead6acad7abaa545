output "user_data" {
  description = "cloud-config for the machine: `user_data` in AWS, `metadata.user-data` in Google Cloud, `custom_data` (base64) in Azure."
  value       = "#cloud-config\n${yamlencode(local.cloud_config)}"
}

output "agent_config" {
  description = "The agent's configuration that the machine gets, as YAML; `tombolo agent --check-config` takes it."
  value       = yamlencode(local.agent)
}
