variable "name" {
  description = "Name of the gateway; everything that is made here begins with it."
  type        = string

  validation {
    condition     = can(regex("^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$", var.name))
    error_message = "name must be 1 to 32 lower-case letters, digits and hyphens, and begin with a letter."
  }
}

variable "region" {
  description = "Region of the cluster whose gateway this is."
  type        = string

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.region))
    error_message = "region must be a region, not a zone: europe-west1."
  }
}

variable "network" {
  description = "VPC network of the cluster: its name, or its self link where it is another project's."
  type        = string

  validation {
    condition     = can(regex("(^|/)[a-z]([-a-z0-9]{0,61}[a-z0-9])?$", var.network))
    error_message = "network must be the name or the self link of a VPC network."
  }
}

variable "node_tags" {
  description = "Network tags of the nodes on which gateways run; the firewall opens the tunnel's port for those only."
  type        = list(string)

  validation {
    condition     = length(var.node_tags) >= 1 && alltrue([for tag in var.node_tags : can(regex("^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$", tag))])
    error_message = "node_tags must be at least one network tag: without one the rule would hold for every machine of the network."
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

variable "network_tier" {
  description = "How traffic from elsewhere reaches the address: PREMIUM enters Google's network near the sender, STANDARD near the region."
  type        = string
  default     = "PREMIUM"

  validation {
    condition     = contains(["PREMIUM", "STANDARD"], var.network_tier)
    error_message = "network_tier must be PREMIUM or STANDARD."
  }
}

variable "dns" {
  description = "Name for the gateway in a Cloud DNS zone. Without one, peers are told the address."
  type = object({
    managed_zone = string
    name         = string
  })
  default = null

  validation {
    condition     = var.dns == null || can(regex("^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$", var.dns.managed_zone))
    error_message = "dns.managed_zone must be the name of a managed zone, not its domain: example-com."
  }

  validation {
    condition     = var.dns == null || can(regex("^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\\.)+[a-z]{2,63}$", var.dns.name))
    error_message = "dns.name must be a full domain name without a dot at its end: gw.west.example.com."
  }
}

variable "labels" {
  description = "Labels of what can have some: the address."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for key, value in var.labels : can(regex("^[a-z][-_a-z0-9]{0,62}$", key)) && can(regex("^[-_a-z0-9]{0,63}$", value))])
    error_message = "labels must be lower-case letters, digits, hyphens and underscores, and their keys begin with a letter."
  }
}
