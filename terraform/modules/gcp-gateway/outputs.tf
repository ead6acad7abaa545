output "advertise" {
  description = "host:port at which peers dial this gateway: for `advertise` in its configuration, and for `gateways` of a ClusterPeer."
  value       = local.advertise
}

output "addresses" {
  description = "The public address of the gateway."
  value       = [google_compute_address.tunnel.address]
}

output "gateway_values" {
  description = "Values of the Helm chart for this cluster's gateways: for `gateway_values` of the module mesh, or for `helm --values`."
  value = {
    gateway = {
      advertise  = local.advertise
      tunnelPort = var.tunnel_port
      service = {
        type                     = "LoadBalancer"
        loadBalancerIP           = google_compute_address.tunnel.address
        loadBalancerSourceRanges = var.peers_ipv4
        externalTrafficPolicy    = "Local"
        annotations = {
          "cloud.google.com/l4-rbs"       = "enabled"
          "cloud.google.com/network-tier" = title(lower(var.network_tier))
        }
      }
    }
  }
}
