output "manifests" {
  description = "By cluster id, the ClusterPeer that belongs into that cluster, as YAML: for `kubectl apply`, or for a file in its directory."
  value       = local.manifests
}
