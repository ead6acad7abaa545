output "advertise" {
  description = "host:port at which peers dial this gateway: for `advertise` in its configuration, and for `gateways` of a ClusterPeer."
  value       = local.advertise
}

output "addresses" {
  description = "The public address of the gateway."
  value       = [azurerm_public_ip.tunnel.ip_address]
}

output "gateway_values" {
  description = "Values of the Helm chart for this cluster's gateways: for `gateway_values` of the module mesh, or for `helm --values`."
  value = {
    gateway = {
      advertise  = local.advertise
      tunnelPort = var.tunnel_port
      service = {
        type                     = "LoadBalancer"
        loadBalancerSourceRanges = var.peers_ipv4
        externalTrafficPolicy    = "Local"
        annotations = {
          "service.beta.kubernetes.io/azure-load-balancer-resource-group" = var.resource_group.name
          "service.beta.kubernetes.io/azure-pip-name"                     = azurerm_public_ip.tunnel.name
        }
      }
    }
  }
}
