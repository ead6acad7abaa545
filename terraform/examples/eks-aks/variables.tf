variable "aws_region" {
  description = "Region of the EKS cluster."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.aws_region))
    error_message = "aws_region must be a region: eu-west-1."
  }
}

variable "eks" {
  description = "The EKS cluster `west`: its VPC, public subnets for the load balancer and their networks, the security group of its nodes, and the addresses from which those reach the internet (NAT gateways). The AWS Load Balancer Controller must run there."
  type = object({
    vpc_id                 = string
    public_subnet_ids      = list(string)
    public_subnets_ipv4    = list(string)
    node_security_group_id = string
    egress_addresses       = list(string)
  })

  validation {
    condition     = length(var.eks.public_subnet_ids) >= 1
    error_message = "eks.public_subnet_ids must name a subnet."
  }

  validation {
    condition     = alltrue([for address in var.eks.egress_addresses : can(cidrnetmask("${address}/32"))]) && length(var.eks.egress_addresses) >= 1
    error_message = "eks.egress_addresses must be IPv4 addresses."
  }
}

variable "azure_subscription_id" {
  description = "Subscription of what is made in Azure."
  type        = string

  validation {
    condition     = can(regex("^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", var.azure_subscription_id))
    error_message = "azure_subscription_id must be a UUID in lower case."
  }
}

variable "aks" {
  description = "The AKS cluster `east`: resource group for the address, object id of the cluster's identity, the nodes' network security group, and the addresses from which the nodes reach the internet."
  type = object({
    resource_group         = object({ id = string, name = string, location = string })
    principal_id           = string
    network_security_group = object({ name = string, resource_group_name = string })
    egress_addresses       = list(string)
  })

  validation {
    condition     = alltrue([for address in var.aks.egress_addresses : can(cidrnetmask("${address}/32"))]) && length(var.aks.egress_addresses) >= 1
    error_message = "aks.egress_addresses must be IPv4 addresses."
  }
}

variable "roots" {
  description = "Of each cluster, by its id, the PEM certificates of its trust domain: `ca.pem` in its federation's state. Known once the federations run; until then leave it out, and there are no links."
  type        = map(string)
  default     = {}

  validation {
    condition     = length(var.roots) == 0 || (length(var.roots) == 2 && alltrue([for id in ["west", "east"] : contains(keys(var.roots), id)]))
    error_message = "roots must have the entries west and east, or none."
  }
}
