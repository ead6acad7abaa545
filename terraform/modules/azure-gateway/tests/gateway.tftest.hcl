mock_provider "azurerm" {}

override_resource {
  target          = azurerm_public_ip.tunnel
  override_during = plan
  values          = { ip_address = "198.51.100.9" }
}

variables {
  name = "north"
  resource_group = {
    id       = "/subscriptions/0000/resourceGroups/mesh"
    name     = "mesh"
    location = "westeurope"
  }
  cluster_principal_id   = "01234567-89ab-cdef-0123-456789abcdef"
  network_security_group = { name = "aks-nodes", resource_group_name = "aks" }
  peers_ipv4             = ["203.0.113.0/24", "192.0.2.7/32"]
}

run "by_address" {
  command = plan

  assert {
    condition     = length(azurerm_dns_a_record.tunnel) == 0
    error_message = "no name was asked for"
  }

  assert {
    condition     = output.advertise == ["198.51.100.9:15443"] && output.addresses == ["198.51.100.9"]
    error_message = "peers must be told the address"
  }

  assert {
    condition     = azurerm_network_security_rule.tunnel.priority == 1443 && azurerm_public_ip.tunnel.zones == toset(["1", "2", "3"])
    error_message = "what is taken unless said otherwise"
  }
}

run "by_name" {
  command = plan

  variables {
    dns                    = { zone_name = "example.com", resource_group_name = "dns", record = "gw.north" }
    network_security_group = { name = "aks-nodes", resource_group_name = "aks", priority = 200 }
    tunnel_port            = 443
    zones                  = ["2"]
    tags                   = { team = "mesh" }
  }

  assert {
    condition = (azurerm_public_ip.tunnel.name == "north-tunnel"
      && azurerm_public_ip.tunnel.resource_group_name == "mesh"
      && azurerm_public_ip.tunnel.location == "westeurope"
      && azurerm_public_ip.tunnel.sku == "Standard"
      && azurerm_public_ip.tunnel.allocation_method == "Static"
      && azurerm_public_ip.tunnel.ip_version == "IPv4"
      && azurerm_public_ip.tunnel.zones == toset(["2"])
    && azurerm_public_ip.tunnel.tags == tomap({ team = "mesh" }))
    error_message = "a fixed public address of the zones"
  }

  assert {
    condition = (azurerm_role_assignment.cluster.scope == "/subscriptions/0000/resourceGroups/mesh"
      && azurerm_role_assignment.cluster.role_definition_name == "Network Contributor"
    && azurerm_role_assignment.cluster.principal_id == "01234567-89ab-cdef-0123-456789abcdef")
    error_message = "the cluster may attach the address, and has no right outside its group"
  }

  assert {
    condition = (azurerm_network_security_rule.tunnel.name == "north-tunnel"
      && azurerm_network_security_rule.tunnel.description == "Tunnels to north"
      && azurerm_network_security_rule.tunnel.resource_group_name == "aks"
      && azurerm_network_security_rule.tunnel.network_security_group_name == "aks-nodes"
      && azurerm_network_security_rule.tunnel.priority == 200
      && azurerm_network_security_rule.tunnel.direction == "Inbound"
      && azurerm_network_security_rule.tunnel.access == "Allow"
      && azurerm_network_security_rule.tunnel.protocol == "Udp"
      && azurerm_network_security_rule.tunnel.source_address_prefixes == toset(["203.0.113.0/24", "192.0.2.7/32"])
      && azurerm_network_security_rule.tunnel.source_port_range == "*"
      && azurerm_network_security_rule.tunnel.destination_address_prefix == "198.51.100.9"
    && azurerm_network_security_rule.tunnel.destination_port_range == "443")
    error_message = "peers reach the tunnel's port of the gateway's address by UDP, and nothing else"
  }

  assert {
    condition = (azurerm_dns_a_record.tunnel[0].name == "gw.north"
      && azurerm_dns_a_record.tunnel[0].zone_name == "example.com"
      && azurerm_dns_a_record.tunnel[0].resource_group_name == "dns"
      && azurerm_dns_a_record.tunnel[0].ttl == 60
      && azurerm_dns_a_record.tunnel[0].records == toset(["198.51.100.9"])
    && azurerm_dns_a_record.tunnel[0].tags == tomap({ team = "mesh" }))
    error_message = "the name has the address"
  }

  assert {
    condition = jsonencode(output.gateway_values) == jsonencode({
      gateway = {
        advertise  = ["gw.north.example.com:443"]
        tunnelPort = 443
        service = {
          type                     = "LoadBalancer"
          loadBalancerSourceRanges = ["203.0.113.0/24", "192.0.2.7/32"]
          externalTrafficPolicy    = "Local"
          annotations = {
            "service.beta.kubernetes.io/azure-load-balancer-resource-group" = "mesh"
            "service.beta.kubernetes.io/azure-pip-name"                     = "north-tunnel"
          }
        }
      }
    })
    error_message = "what the Service and the gateway are told"
  }
}
