variable "cluster" {
  description = "Name of the cluster that this machine is. Its trust domain is <cluster>.tombolo."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$", var.cluster))
    error_message = "cluster must be a DNS label of at most 32 characters."
  }
}

variable "program" {
  description = "Where the machine fetches the program `tombolo` (built for its architecture), and the SHA-256 that it must have."
  type = object({
    url    = string
    sha256 = string
  })

  validation {
    condition     = can(regex("^https://[-._~:/?#@!&()*+,;=%A-Za-z0-9]+$", var.program.url))
    error_message = "program.url must be an https:// address."
  }

  validation {
    condition     = can(regex("^[0-9a-f]{64}$", var.program.sha256))
    error_message = "program.sha256 must be 64 lower-case hexadecimal digits, as sha256sum prints them."
  }
}

variable "tunnel_port" {
  description = "UDP port of the tunnels to other clusters' gateways."
  type        = number
  default     = 15443

  validation {
    condition     = var.tunnel_port == floor(var.tunnel_port) && var.tunnel_port >= 1 && var.tunnel_port <= 65535
    error_message = "tunnel_port must be a port, 1 to 65535."
  }
}

variable "advertise" {
  description = "host:port at which peers can dial the tunnel; [] where they can't, and this machine dials them."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for address in var.advertise : can(regex("^([-.a-z0-9]+|\\[[0-9a-f:]+\\]):[0-9]{1,5}$", address))])
    error_message = "advertise must be host:port: gw.west.example.com:15443, [2001:db8::7]:15443."
  }
}

variable "workloads" {
  description = "Identities on this machine, each with a sidecar of its own: `outbound`, the address of its forward proxy, and the services that it serves: `service` as namespace/name, `port` as callers know it, `app` the application's address."
  type = list(object({
    namespace       = string
    service_account = string
    outbound        = string
    services = optional(list(object({
      service  = string
      port     = number
      app      = string
      protocol = optional(string, "opaque")
    })), [])
  }))
  default = []

  validation {
    condition     = alltrue([for workload in var.workloads : alltrue([for name in [workload.namespace, workload.service_account] : can(regex("^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", name))])])
    error_message = "workloads: namespace and service_account must be DNS labels."
  }

  validation {
    condition     = alltrue([for workload in var.workloads : can(regex("^127\\.0\\.0\\.1:[0-9]{1,5}$", workload.outbound))]) && length(distinct(var.workloads[*].outbound)) == length(var.workloads)
    error_message = "workloads: outbound must be 127.0.0.1:PORT, another port for each: whoever reaches it calls with that identity."
  }

  validation {
    condition     = alltrue(flatten([for workload in var.workloads : [for served in workload.services : can(regex("^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", served.service)) && can(regex("^[-.a-z0-9]+:[0-9]{1,5}$", served.app))]]))
    error_message = "workloads: services need `service` as namespace/name and `app` as host:port."
  }

  validation {
    condition     = alltrue(flatten([for workload in var.workloads : [for served in workload.services : served.port >= 1 && served.port <= 65535 && contains(["http", "http2", "grpc", "opaque"], served.protocol)]]))
    error_message = "workloads: services need a port of 1 to 65535, and protocol http, http2, grpc or opaque."
  }
}

variable "cluster_files" {
  description = "Files of the directory that describes this cluster: name to YAML of one resource each (Service, ServiceExport, ClusterPeer, policies)."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for name, _ in var.cluster_files : can(regex("^[a-z0-9][-.a-z0-9]*\\.yaml$", name))])
    error_message = "cluster_files: names must be lower-case and end in .yaml."
  }

  validation {
    condition     = alltrue([for _, text in var.cluster_files : can(yamldecode(text).kind)])
    error_message = "cluster_files: each must be the YAML of one resource."
  }

  validation {
    condition     = alltrue([for _, text in var.cluster_files : !strcontains(text, "PRIVATE KEY")])
    error_message = "cluster_files: there is a private key in one; user data is no place for secrets."
  }
}

variable "invitation" {
  description = "Secret that holds, or will hold, the token of `tombolo peer invite`, which the machine fetches with its own identity: an ARN of AWS Secrets Manager, projects/PROJECT/secrets/NAME, or https://VAULT.vault.azure.net/secrets/NAME. `imports` is what the inviting cluster may bring in here, `exports` what it is offered."
  type = object({
    secret  = string
    imports = optional(list(string), [])
    exports = optional(list(string), ["*"])
  })
  default = null

  validation {
    condition     = var.invitation == null || can(regex("^(arn:aws(-[a-z]+)*:secretsmanager:[-a-z0-9]+:[0-9]{12}:secret:[-/_+=.@A-Za-z0-9]+|projects/[-a-z0-9]+/secrets/[-_A-Za-z0-9]+|https://[-a-z0-9]+\\.vault\\.azure\\.net/secrets/[-A-Za-z0-9]+)$", var.invitation.secret))
    error_message = "invitation.secret must name a secret: arn:aws:secretsmanager:..., projects/PROJECT/secrets/NAME or https://VAULT.vault.azure.net/secrets/NAME. It is never the token itself."
  }

  validation {
    condition     = var.invitation == null || alltrue([for selector in try(concat(var.invitation.imports, var.invitation.exports), []) : can(regex("^(\\*|[a-z0-9]([-a-z0-9]*[a-z0-9])?(/\\*|/[a-z0-9]([-a-z0-9]*[a-z0-9])?)?)$", selector))])
    error_message = "invitation.imports and exports must be *, namespace/* or namespace/name."
  }
}
