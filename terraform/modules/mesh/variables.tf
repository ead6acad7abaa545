variable "cluster" {
  description = "Name of this cluster among its peers. It can't be changed later."
  type        = string

  validation {
    condition     = can(regex("^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$", var.cluster))
    error_message = "cluster must be a DNS label of at most 32 characters that begins with a letter."
  }
}

variable "trust_domain" {
  description = "Trust domain of this cluster; <cluster>.tombolo if null. It can't be changed later."
  type        = string
  default     = null

  validation {
    condition     = var.trust_domain == null || can(regex("^[a-z0-9][-a-z0-9._]{0,252}$", var.trust_domain))
    error_message = "trust_domain must be lower-case letters, digits, dots, hyphens and underscores."
  }
}

variable "namespace" {
  description = "Namespace that is made for tombolo; pods in it are held to the level `restricted` of pod security."
  type        = string
  default     = "tombolo-system"

  validation {
    condition     = can(regex("^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", var.namespace))
    error_message = "namespace must be a DNS label."
  }
}

variable "chart" {
  description = "Where the chart is: a folder (deploy/helm/tombolo of this repository), an archive, or oci://REGISTRY/tombolo."
  type        = string

  validation {
    condition     = can(regex("^[^\\s]+$", var.chart))
    error_message = "chart must be a path or an oci:// address."
  }
}

variable "image" {
  description = "The program's image: `repository`, and either `digest` (sha256:...) or, for an image that was loaded into the nodes, `tag`."
  type = object({
    repository = string
    digest     = optional(string, "")
    tag        = optional(string, "")
  })

  validation {
    condition     = can(regex("^[a-z0-9]+([._:/-]+[a-z0-9]+)*$", var.image.repository))
    error_message = "image.repository must be a repository without tag or digest: registry.example.com/tombolo."
  }

  validation {
    condition     = can(regex("^sha256:[0-9a-f]{64}$", var.image.digest)) ? var.image.tag == "" : var.image.digest == "" && var.image.tag != ""
    error_message = "image needs either a digest, sha256:..., or a tag."
  }
}

variable "registry" {
  description = "Server and user of a registry that asks who fetches the image; its password is `registry_password`. null where it asks nobody."
  type = object({
    server = string
    user   = string
  })
  default = null

  validation {
    condition     = var.registry == null || can(regex("^[-.:a-z0-9]+$", var.registry.server))
    error_message = "registry.server must be a host, with a port if need be: registry.example.com."
  }
}

variable "registry_password" {
  description = "Password for `registry`. It is written to the cluster and kept nowhere else, neither in a plan nor in the state."
  type        = string
  ephemeral   = true
  default     = null

  validation {
    condition     = (var.registry_password == null) == (var.registry == null)
    error_message = "registry_password goes with registry: set both or none."
  }
}

variable "registry_password_revision" {
  description = "Raise it to write a changed `registry_password`: Terraform can't compare what it does not keep."
  type        = number
  default     = 1

  validation {
    condition     = var.registry_password_revision == floor(var.registry_password_revision) && var.registry_password_revision >= 1
    error_message = "registry_password_revision must be a whole number, 1 or more."
  }
}

variable "replicas" {
  description = "Replicas of the federation, and of the gateways. With 1 a node that goes down takes the cluster out of the network until they run elsewhere."
  type        = number
  default     = 2

  validation {
    condition     = var.replicas == floor(var.replicas) && var.replicas >= 1 && var.replicas <= 9
    error_message = "replicas must be 1 to 9."
  }
}

variable "gateway_values" {
  description = "What a cloud's gateway must be told: the output `gateway_values` of aws-gateway, azure-gateway or gcp-gateway. {} for gateways that only dial, with `gateway.service.enabled: false` in `values`."
  type        = any
  default     = {}

  validation {
    condition     = can(keys(var.gateway_values)) && alltrue([for key in try(keys(var.gateway_values), []) : contains(["gateway", "networkPolicy"], key)])
    error_message = "gateway_values must be the output of a gateway's module: an object with gateway and networkPolicy."
  }
}

variable "values" {
  description = "Further values of the chart, each a YAML text; a later one counts over an earlier one and over all else. They are in the state: no secrets."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for text in var.values : can(keys(yamldecode(text)))])
    error_message = "values must be YAML mappings."
  }
}

variable "timeout_seconds" {
  description = "How long the pods may take to be ready; then what was installed is taken back."
  type        = number
  default     = 300

  validation {
    condition     = var.timeout_seconds == floor(var.timeout_seconds) && var.timeout_seconds >= 30
    error_message = "timeout_seconds must be a whole number, 30 or more."
  }
}
