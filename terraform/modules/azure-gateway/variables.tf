variable "name" {
  description = "Name of the gateway; everything that is made here begins with it."
  type        = string

  validation {
    condition     = can(regex("^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$", var.name))
    error_message = "name must be 1 to 32 lower-case letters, digits and hyphens, and begin with a letter."
  }
}

variable "resource_group" {
  description = "Resource group for what is made here. Another one than the node group that AKS makes, whose end would end the address."
  type = object({
    id       = string
    name     = string
    location = string
  })

  validation {
    condition     = can(regex("^/subscriptions/[^/]+/resourceGroups/[^/]+$", var.resource_group.id)) && endswith(lower(var.resource_group.id), lower("/${var.resource_group.name}"))
    error_message = "resource_group.id must be the full id of the group that resource_group.name names: /subscriptions/.../resourceGroups/NAME."
  }

  validation {
    condition     = can(regex("^[a-z0-9]+$", var.resource_group.location))
    error_message = "resource_group.location must be a region's short name: westeurope."
  }
}

variable "zones" {
  description = "Availability zones that the address spans; [] where the region has none."
  type        = set(string)
  default     = ["1", "2", "3"]

  validation {
    condition     = alltrue([for zone in var.zones : contains(["1", "2", "3"], zone)])
    error_message = "zones must be some of 1, 2 and 3."
  }
}

variable "cluster_principal_id" {
  description = "Object id of the AKS cluster's identity, which attaches the address to its load balancer and needs the role Network Contributor in the resource group for it."
  type        = string

  validation {
    condition     = can(regex("^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", var.cluster_principal_id))
    error_message = "cluster_principal_id must be an object id, a UUID in lower case."
  }
}

variable "network_security_group" {
  description = "Network security group of the nodes' subnet, which is opened for the tunnel's port; `priority` is the rule's, unlike any other there."
  type = object({
    name                = string
    resource_group_name = string
    priority            = optional(number, 1443)
  })

  validation {
    condition     = length(var.network_security_group.name) >= 1 && length(var.network_security_group.resource_group_name) >= 1
    error_message = "network_security_group.name and its resource_group_name must not be empty."
  }

  validation {
    condition     = var.network_security_group.priority >= 100 && var.network_security_group.priority <= 4096 && var.network_security_group.priority == floor(var.network_security_group.priority)
    error_message = "network_security_group.priority must be 100 to 4096."
  }
}

variable "peers_ipv4" {
  description = "Networks from which other clusters' gateways dial this one. [\"0.0.0.0/0\"] admits everybody to the port; who has no identity that a peering names is refused there by the gateway."
  type        = list(string)

  validation {
    condition     = length(var.peers_ipv4) >= 1 && length(var.peers_ipv4) == length(distinct(var.peers_ipv4))
    error_message = "peers_ipv4 must name at least one network, and none twice."
  }

  validation {
    condition     = alltrue([for network in var.peers_ipv4 : can(cidrnetmask(network))])
    error_message = "peers_ipv4 must be IPv4 networks: 203.0.113.0/24."
  }
}

variable "tunnel_port" {
  description = "UDP port of the tunnels between gateways, at the nodes and at the load balancer."
  type        = number
  default     = 15443

  validation {
    condition     = var.tunnel_port == floor(var.tunnel_port) && var.tunnel_port >= 1 && var.tunnel_port <= 65535
    error_message = "tunnel_port must be a port, 1 to 65535."
  }
}

variable "dns" {
  description = "Name for the gateway in an Azure DNS zone: `record` in `zone_name`. Without one, peers are told the address."
  type = object({
    zone_name           = string
    resource_group_name = string
    record              = string
  })
  default = null

  validation {
    condition     = var.dns == null || can(regex("^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\\.)+[a-z]{2,63}$", var.dns.zone_name))
    error_message = "dns.zone_name must be the domain of the zone, without a dot at its end: example.com."
  }

  validation {
    condition     = var.dns == null || can(regex("^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*$", var.dns.record))
    error_message = "dns.record must be the name inside the zone: gw.west."
  }

  validation {
    condition     = var.dns == null || try(length(var.dns.resource_group_name) >= 1, false)
    error_message = "dns.resource_group_name must be the resource group of the zone."
  }
}

variable "tags" {
  description = "Tags of what can have some: the address and the name."
  type        = map(string)
  default     = {}

  validation {
    condition     = length(var.tags) <= 50 && alltrue([for key, value in var.tags : length(key) <= 512 && length(value) <= 256])
    error_message = "tags must be at most 50, with keys of at most 512 characters and values of at most 256."
  }
}
