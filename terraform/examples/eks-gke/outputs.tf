output "gateway_values" {
  description = "By cluster, what its gateway and the Service in front of it must be told."
  value = {
    west = module.west.gateway_values
    east = module.east.gateway_values
  }
}

output "service_manifests" {
  description = "By cluster, the Service in front of the gateway, as YAML for `kubectl apply`; it selects the pods with the label app: tombolo-gateway."
  value = { for id, values in { west = module.west.gateway_values, east = module.east.gateway_values } : id => yamlencode({
    apiVersion = "v1"
    kind       = "Service"
    metadata   = { name = "tombolo-gateway", namespace = "tombolo-system", annotations = values.service.annotations }
    spec       = merge(values.service.spec, { selector = { app = "tombolo-gateway" } })
  }) }
}

output "peer_manifests" {
  description = "By cluster, the ClusterPeer that links it to the other one, as YAML for `kubectl apply`; empty without `roots`."
  value       = try(module.peering[0].manifests, {})
}
