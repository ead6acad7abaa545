variable "gcp_project" {
  description = "Project of what is made in Google Cloud."
  type        = string

  validation {
    condition     = can(regex("^[a-z][-a-z0-9]{4,28}[a-z0-9]$", var.gcp_project))
    error_message = "gcp_project must be a project's id, not its name or number."
  }
}

variable "gke" {
  description = "The GKE cluster `west`: its context in `kubeconfig`, region, VPC network, network tags of its nodes, and the addresses from which its nodes reach the internet (Cloud NAT, or their own)."
  type = object({
    context          = string
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

variable "azure_subscription_id" {
  description = "Subscription of what is made in Azure."
  type        = string

  validation {
    condition     = can(regex("^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", var.azure_subscription_id))
    error_message = "azure_subscription_id must be a UUID in lower case."
  }
}

variable "aks" {
  description = "The AKS cluster `east`: its context in `kubeconfig`, resource group for the address, object id of the cluster's identity, the nodes' network security group, and the addresses from which the nodes reach the internet."
  type = object({
    context                = string
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

variable "kubeconfig" {
  description = "File with a context for each of the two clusters; who plans and applies acts with its rights."
  type        = string
  default     = "~/.kube/config"

  validation {
    condition     = length(var.kubeconfig) >= 1
    error_message = "kubeconfig must be a path."
  }
}

variable "image" {
  description = "The program's image, in a registry that both clusters reach without a password."
  type = object({
    repository = string
    digest     = string
  })

  validation {
    condition     = can(regex("^sha256:[0-9a-f]{64}$", var.image.digest))
    error_message = "image.digest must be sha256: and 64 hexadecimal digits."
  }
}

variable "vm" {
  description = "Where the machine stands: a zone of GKE's region, and the self link of a subnetwork there."
  type = object({
    zone       = string
    subnetwork = string
  })

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+-[a-z]$", var.vm.zone)) && startswith(var.vm.zone, "${var.gke.region}-")
    error_message = "vm.zone must be a zone of gke.region: europe-west1-b."
  }

  validation {
    condition     = can(regex("^(https://www.googleapis.com/compute/v1/)?projects/[^/]+/regions/[^/]+/subnetworks/[^/]+$", var.vm.subnetwork))
    error_message = "vm.subnetwork must be a self link: projects/PROJECT/regions/REGION/subnetworks/NAME."
  }
}

variable "program" {
  description = "Where the machine fetches the program `tombolo`, built for x86-64 Linux, and the SHA-256 that it must have."
  type = object({
    url    = string
    sha256 = string
  })

  validation {
    condition     = startswith(var.program.url, "https://")
    error_message = "program.url must be an https:// address."
  }
}

variable "invitation_secret" {
  description = "Name of the secret in Secret Manager, made before, into which the invitation is put by hand; only the machine may read it."
  type        = string

  validation {
    condition     = can(regex("^[-_A-Za-z0-9]{1,255}$", var.invitation_secret))
    error_message = "invitation_secret must be the name of a secret, without its project."
  }
}

variable "roots" {
  description = "Of each cluster, by its id, the PEM certificates of its trust domain: `ca.pem` of the ConfigMap tombolo-ca. Known once the federations run; until then leave it out, and there are no links."
  type        = map(string)
  default     = {}

  validation {
    condition     = length(var.roots) == 0 || (length(var.roots) == 2 && alltrue([for id in ["west", "east"] : contains(keys(var.roots), id)]))
    error_message = "roots must have the entries west and east, or none."
  }
}
