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

variable "gcp_project" {
  description = "Project of what is made in Google Cloud."
  type        = string

  validation {
    condition     = can(regex("^[a-z][-a-z0-9]{4,28}[a-z0-9]$", var.gcp_project))
    error_message = "gcp_project must be a project's id, not its name or number."
  }
}

variable "gke" {
  description = "The GKE cluster `east`: region, VPC network, network tags of its nodes, and the addresses from which its nodes reach the internet (Cloud NAT, or their own)."
  type = object({
    region           = string
    network          = string
    node_tags        = list(string)
    egress_addresses = list(string)
  })

  validation {
    condition     = alltrue([for address in var.gke.egress_addresses : can(cidrnetmask("${address}/32"))]) && length(var.gke.egress_addresses) >= 1
    error_message = "gke.egress_addresses must be IPv4 addresses."
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
