variable "clusters" {
  description = "The two clusters to link, by cluster id: `roots`, the PEM certificates of its trust domain, best as the whole text of `ca.pem` in its federation's state, which says the trust domain and the sequence too; `gateways`, host:port at which the other one dials it, [] where it can't; `imports`, what the other one may bring in here, `exports`, what the other one is offered, each of *, namespace/* and namespace/name. `trust_domain` (<id>.tombolo) and `sequence` (0, to be raised with every change of the roots) are for roots that don't say."
  type = map(object({
    roots        = string
    trust_domain = optional(string)
    sequence     = optional(number)
    gateways     = optional(list(string), [])
    imports      = optional(list(string), [])
    exports      = optional(list(string), ["*"])
  }))

  validation {
    condition     = length(var.clusters) == 2
    error_message = "clusters must be two."
  }

  validation {
    condition     = alltrue([for name, _ in var.clusters : can(regex("^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$", name))])
    error_message = "clusters: each id must be a DNS label of at most 32 characters."
  }

  validation {
    condition     = alltrue([for cluster in values(var.clusters) : can(regex("^(Trust-Domain: [^\\n]+\\n|Sequence: [0-9]+\\n)*(-----BEGIN CERTIFICATE-----\\n[A-Za-z0-9+/=\\n]+\\n-----END CERTIFICATE-----\\n?)+$", cluster.roots))])
    error_message = "clusters: roots must be PEM certificates and nothing else; a private key has no place here."
  }

  validation {
    condition     = length(distinct([for name, cluster in var.clusters : coalesce(cluster.trust_domain, try(regex("(?m)^Trust-Domain: (.+)$", cluster.roots)[0], null), "${name}.tombolo")])) == length(var.clusters)
    error_message = "clusters: each must have a trust domain of its own."
  }

  validation {
    condition     = anytrue([for cluster in values(var.clusters) : length(cluster.gateways) > 0])
    error_message = "clusters: at least one must have a gateway that the other one can dial."
  }

  validation {
    condition     = alltrue(flatten([for cluster in values(var.clusters) : [for address in cluster.gateways : can(regex("^([-.a-z0-9]+|\\[[0-9a-f:]+\\]):[0-9]{1,5}$", address))]]))
    error_message = "clusters: gateways must be host:port: gw.west.example.com:15443."
  }

  validation {
    condition     = alltrue(flatten([for cluster in values(var.clusters) : [for selector in concat(cluster.imports, cluster.exports) : can(regex("^(\\*|[a-z0-9]([-a-z0-9]*[a-z0-9])?(/\\*|/[a-z0-9]([-a-z0-9]*[a-z0-9])?)?)$", selector))]]))
    error_message = "clusters: imports and exports must be *, namespace/* or namespace/name."
  }

  validation {
    condition     = alltrue([for cluster in values(var.clusters) : try(cluster.sequence >= 0 && cluster.sequence == floor(cluster.sequence), cluster.sequence == null)])
    error_message = "clusters: sequence must be a whole number."
  }
}
