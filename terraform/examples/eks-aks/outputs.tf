output "gateway_values" {
  description = "By cluster, values of the Helm chart for its gateways, beside `cluster` and `image`."
  value = {
    west = module.west.gateway_values
    east = module.east.gateway_values
  }
}

output "peer_manifests" {
  description = "By cluster, the ClusterPeer that links it to the other one, as YAML for `kubectl apply`; empty without `roots`."
  value       = try(module.peering[0].manifests, {})
}
