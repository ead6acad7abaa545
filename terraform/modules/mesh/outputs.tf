output "namespace" {
  description = "The namespace in which tombolo is, once it is installed."
  value       = helm_release.tombolo.namespace
}

output "values" {
  description = "The values that the chart got, each a YAML text, the later ones counting over the earlier ones."
  value       = helm_release.tombolo.values
}
