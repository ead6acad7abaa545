# A ClusterPeer for each of two clusters, about the other one. All of it is public: certificates, addresses, names.

locals {
  ids = sort(keys(var.clusters))

  manifests = { for id in local.ids : id => yamlencode({
    apiVersion = "tombolo.dev/v1alpha1"
    kind       = "ClusterPeer"
    metadata   = { name = local.other[id] }
    spec = {
      cluster     = local.other[id]
      trustDomain = coalesce(var.clusters[local.other[id]].trust_domain, "${local.other[id]}.tombolo")
      bundle = {
        roots    = var.clusters[local.other[id]].roots
        sequence = var.clusters[local.other[id]].sequence
      }
      gateways = var.clusters[local.other[id]].gateways
      exports  = var.clusters[id].exports
      imports  = var.clusters[id].imports
    }
  }) }

  other = zipmap(local.ids, reverse(local.ids))
}
