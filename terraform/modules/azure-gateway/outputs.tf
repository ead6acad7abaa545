output "advertise" {
  description = "host:port at which peers dial this gateway: for `advertise` in its configuration, and for `gateways` of a ClusterPeer."
  value       = local.advertise
}

output "addresses" {
  description = "The public address of the gateway."
  value       = [azurerm_public_ip.tunnel.ip_address]
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
        "service.beta.kubernetes.io/azure-load-balancer-resource-group" = var.resource_group.name
        "service.beta.kubernetes.io/azure-pip-name"                     = azurerm_public_ip.tunnel.name
      }
      spec = {
        type                     = "LoadBalancer"
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
