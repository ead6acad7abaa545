# Two Kubernetes clusters, west in EKS and east in GKE. Each gateway admits the other cluster only; east may bring in what
# west exports of the namespace shop.

module "west" {
  source = "../../modules/aws-gateway"

  name                   = "west"
  vpc_id                 = var.eks.vpc_id
  subnet_ids             = var.eks.public_subnet_ids
  subnets_ipv4           = var.eks.public_subnets_ipv4
  node_security_group_id = var.eks.node_security_group_id
  peers_ipv4             = [for address in var.gke.egress_addresses : "${address}/32"]
}

module "east" {
  source = "../../modules/gcp-gateway"

  name       = "east"
  region     = var.gke.region
  network    = var.gke.network
  node_tags  = var.gke.node_tags
  peers_ipv4 = [for address in var.eks.egress_addresses : "${address}/32"]
}

# Both sides' roots exist only once the federations run, so the links come with a second apply.
module "peering" {
  count  = length(var.roots) == 0 ? 0 : 1
  source = "../../modules/peering"

  clusters = {
    west = {
      roots    = var.roots["west"]
      gateways = module.west.advertise
    }
    east = {
      roots    = var.roots["east"]
      gateways = module.east.advertise
      imports  = ["shop/*"]
    }
  }
}
