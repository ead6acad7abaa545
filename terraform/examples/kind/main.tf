# Two clusters of kind on one machine. West can be dialled at a port of its node; east only dials, and may bring in what west
# exports of the namespace shop. One replica each: there is one node.

locals {
  chart     = "${path.module}/../../../deploy/helm/tombolo"
  image     = { repository = "localhost/tombolo", tag = var.image_tag }
  node_port = 30443
  advertise = ["${var.west_node_address}:${local.node_port}"]
}

module "west" {
  source    = "../../modules/mesh"
  providers = { helm = helm.west, kubernetes = kubernetes.west }

  cluster  = "west"
  chart    = local.chart
  image    = local.image
  replicas = 1
  gateway_values = { gateway = {
    advertise = local.advertise
    service   = { type = "NodePort", nodePort = local.node_port }
  } }
  values = [yamlencode({ image = { pullPolicy = "Never" } })]
}

module "east" {
  source    = "../../modules/mesh"
  providers = { helm = helm.east, kubernetes = kubernetes.east }

  cluster        = "east"
  chart          = local.chart
  image          = local.image
  replicas       = 1
  gateway_values = { gateway = { service = { enabled = false } } }
  values         = [yamlencode({ image = { pullPolicy = "Never" } })]
}

# Both sides' roots exist only once the federations run, so the link comes with a second apply.
module "peering" {
  count  = length(var.roots) == 0 ? 0 : 1
  source = "../../modules/peering"

  clusters = {
    west = {
      roots    = var.roots["west"]
      gateways = local.advertise
    }
    east = {
      roots   = var.roots["east"]
      imports = ["shop/*"]
    }
  }
}
