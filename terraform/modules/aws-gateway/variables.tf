variable "name" {
  description = "Name of the gateway; everything that is made here begins with it."
  type        = string

  validation {
    condition     = can(regex("^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$", var.name))
    error_message = "name must be 1 to 32 lower-case letters, digits and hyphens, and begin with a letter."
  }
}

variable "vpc_id" {
  description = "VPC of the cluster whose gateway this is."
  type        = string

  validation {
    condition     = can(regex("^vpc-[0-9a-f]+$", var.vpc_id))
    error_message = "vpc_id must be the id of a VPC: vpc-0123456789abcdef0."
  }
}

variable "subnet_ids" {
  description = "Public subnets in which the load balancer stands, one for each availability zone; each costs one Elastic IP address."
  type        = list(string)

  validation {
    condition     = length(var.subnet_ids) >= 1 && length(var.subnet_ids) == length(distinct(var.subnet_ids))
    error_message = "subnet_ids must name at least one subnet, and none twice."
  }

  validation {
    condition     = alltrue([for id in var.subnet_ids : can(regex("^subnet-[0-9a-f]+$", id))])
    error_message = "subnet_ids must be ids of subnets: subnet-0123456789abcdef0."
  }
}

variable "subnets_ipv4" {
  description = "IPv4 networks of `subnet_ids`: from there the load balancer asks gateways for their health, which the chart's NetworkPolicy must let it do."
  type        = list(string)

  validation {
    condition     = length(var.subnets_ipv4) == length(var.subnet_ids) && alltrue([for network in var.subnets_ipv4 : can(cidrnetmask(network))])
    error_message = "subnets_ipv4 must be the IPv4 network of each subnet of subnet_ids: 10.0.0.0/20."
  }
}

variable "node_security_group_id" {
  description = "Security group of the nodes or pods on which gateways run; it is opened to the load balancer for the tunnel's and the health check's port."
  type        = string

  validation {
    condition     = can(regex("^sg-[0-9a-f]+$", var.node_security_group_id))
    error_message = "node_security_group_id must be the id of a security group: sg-0123456789abcdef0."
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
  description = "UDP port of the tunnels between gateways, here and at the load balancer."
  type        = number
  default     = 15443

  validation {
    condition     = var.tunnel_port == floor(var.tunnel_port) && var.tunnel_port >= 1 && var.tunnel_port <= 65535
    error_message = "tunnel_port must be a port, 1 to 65535."
  }
}

variable "health_port" {
  description = "TCP port of the gateway's admin server, whose /readyz the load balancer asks: a load balancer can't check UDP."
  type        = number
  default     = 15020

  validation {
    condition     = var.health_port == floor(var.health_port) && var.health_port >= 1 && var.health_port <= 65535
    error_message = "health_port must be a port, 1 to 65535."
  }
}

variable "dns" {
  description = "Name for the gateway in a Route 53 zone. Without one, peers are told the addresses."
  type = object({
    zone_id = string
    name    = string
  })
  default = null

  validation {
    condition     = var.dns == null || can(regex("^Z[0-9A-Z]+$", var.dns.zone_id))
    error_message = "dns.zone_id must be the id of a hosted zone: Z0123456789ABCDEFGHIJ."
  }

  validation {
    condition     = var.dns == null || can(regex("^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\\.)+[a-z]{2,63}$", var.dns.name))
    error_message = "dns.name must be a full domain name without a dot at its end: gw.west.example.com."
  }
}

variable "tags" {
  description = "Tags of everything that is made here."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for key, _ in var.tags : !startswith(lower(key), "aws:")])
    error_message = "tags must not begin with aws:, which is AWS's own."
  }
}
