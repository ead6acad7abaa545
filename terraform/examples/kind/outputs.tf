output "peer_manifests" {
  description = "By cluster, the ClusterPeer that links it to the other one, as YAML for `kubectl apply`; empty without `roots`."
  value       = try(module.peering[0].manifests, {})
}
