# What a gateway in AKS needs of Azure: a fixed address, the right to use it, the network security group, a name. The load
# balancer itself belongs to the Kubernetes Service; `gateway_values` says how that must look.

locals {
  host      = var.dns == null ? azurerm_public_ip.tunnel.ip_address : "${var.dns.record}.${var.dns.zone_name}"
  advertise = ["${local.host}:${var.tunnel_port}"]
}

resource "azurerm_public_ip" "tunnel" {
  name                = "${var.name}-tunnel"
  resource_group_name = var.resource_group.name
  location            = var.resource_group.location
  sku                 = "Standard"
  allocation_method   = "Static"
  ip_version          = "IPv4"
  zones               = var.zones
  tags                = var.tags
}

# AKS looks for the address by name in its group, so the right is one in the group.
resource "azurerm_role_assignment" "cluster" {
  scope                = var.resource_group.id
  role_definition_name = "Network Contributor"
  principal_id         = var.cluster_principal_id
}

resource "azurerm_network_security_rule" "tunnel" {
  name                        = "${var.name}-tunnel"
  description                 = "Tunnels to ${var.name}"
  resource_group_name         = var.network_security_group.resource_group_name
  network_security_group_name = var.network_security_group.name
  priority                    = var.network_security_group.priority
  direction                   = "Inbound"
  access                      = "Allow"
  protocol                    = "Udp"
  source_address_prefixes     = var.peers_ipv4
  source_port_range           = "*"
  destination_address_prefix  = azurerm_public_ip.tunnel.ip_address
  destination_port_range      = tostring(var.tunnel_port)
}

resource "azurerm_dns_a_record" "tunnel" {
  count = var.dns == null ? 0 : 1

  name                = var.dns.record
  zone_name           = var.dns.zone_name
  resource_group_name = var.dns.resource_group_name
  ttl                 = 60
  records             = [azurerm_public_ip.tunnel.ip_address]
  tags                = var.tags
}
