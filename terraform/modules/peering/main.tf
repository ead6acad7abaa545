# A ClusterPeer for each of two clusters, about the other one. All of it is public: certificates, addresses, names.

locals {
  ids   = sort(keys(var.clusters))
  other = zipmap(local.ids, reverse(local.ids))

  # What a federation's ca.pem says before its certificates counts where nothing else is said.
  about = { for id, cluster in var.clusters : id => {
    trust_domain = coalesce(cluster.trust_domain, try(regex("(?m)^Trust-Domain: (.+)$", cluster.roots)[0], null), "${id}.tombolo")
    sequence     = coalesce(cluster.sequence, try(tonumber(regex("(?m)^Sequence: (.+)$", cluster.roots)[0]), null), 0)
    roots        = join("", regexall("-----BEGIN CERTIFICATE-----\\n[^-]+\\n-----END CERTIFICATE-----\\n?", cluster.roots))
  } }

  manifests = { for id in local.ids : id => yamlencode({
    apiVersion = "tombolo.dev/v1alpha1"
    kind       = "ClusterPeer"
    metadata   = { name = local.other[id] }
    spec = {
      cluster     = local.other[id]
      trustDomain = local.about[local.other[id]].trust_domain
      bundle = {
        roots    = local.about[local.other[id]].roots
        sequence = local.about[local.other[id]].sequence
      }
      gateways = var.clusters[local.other[id]].gateways
      exports  = var.clusters[id].exports
      imports  = var.clusters[id].imports
    }
  }) }
}
