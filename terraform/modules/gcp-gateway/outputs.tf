output "advertise" {
  description = "host:port at which peers dial this gateway: for `advertise` in its configuration, and for `gateways` of a ClusterPeer."
  value       = local.advertise
}

output "addresses" {
  description = "The public address of the gateway."
  value       = [google_compute_address.tunnel.address]
}

output "gateway_values" {
  description = "What Kubernetes must be told: `gateway`, fields of the gateway's configuration, and `service`, annotations and spec of the Service in front of it."
  value = {
    gateway = {
      tunnel    = "0.0.0.0:${var.tunnel_port}"
      advertise = local.advertise
    }
    service = {
      annotations = {
        "cloud.google.com/l4-rbs"       = "enabled"
        "cloud.google.com/network-tier" = title(lower(var.network_tier))
      }
      spec = {
        type                     = "LoadBalancer"
        loadBalancerIP           = google_compute_address.tunnel.address
        loadBalancerSourceRanges = var.peers_ipv4
        externalTrafficPolicy    = "Local"
        ports = [{
          name       = "tunnel"
          protocol   = "UDP"
          port       = var.tunnel_port
          targetPort = var.tunnel_port
        }]
      }
    }
  }
}
