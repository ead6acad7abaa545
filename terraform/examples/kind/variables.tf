variable "west_node_address" {
  description = "IPv4 address of west's node in the network of containers, where east dials it: `docker inspect west-control-plane`."
  type        = string

  validation {
    condition     = can(cidrnetmask("${var.west_node_address}/32"))
    error_message = "west_node_address must be an IPv4 address."
  }
}

variable "image_tag" {
  description = "Tag of the image localhost/tombolo that was loaded into both clusters' nodes."
  type        = string
  default     = "dev"

  validation {
    condition     = can(regex("^[A-Za-z0-9_][-A-Za-z0-9._]{0,127}$", var.image_tag))
    error_message = "image_tag must be a tag."
  }
}

variable "kubeconfig" {
  description = "File with the contexts kind-west and kind-east."
  type        = string
  default     = "~/.kube/config"

  validation {
    condition     = length(var.kubeconfig) >= 1
    error_message = "kubeconfig must be a path."
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
