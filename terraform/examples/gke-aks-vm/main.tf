# Three clusters: `west` in GKE, `east` in AKS, both there already, and `vm`, one machine in Google Cloud that can't be dialled. tombolo is
# installed in the two; west and east are linked by ClusterPeers, the machine accepts west's invitation by itself.

locals {
  chart = "${path.module}/../../../deploy/helm/tombolo"
}

module "west_gateway" {
  source = "../../modules/gcp-gateway"

  name       = "west"
  region     = var.gke.region
  network    = var.gke.network
  node_tags  = var.gke.node_tags
  peers_ipv4 = [for address in concat(var.aks.egress_addresses, [google_compute_address.vm.address]) : "${address}/32"]
}

module "east_gateway" {
  source = "../../modules/azure-gateway"

  name                   = "east"
  resource_group         = var.aks.resource_group
  cluster_principal_id   = var.aks.principal_id
  network_security_group = var.aks.network_security_group
  peers_ipv4             = [for address in var.gke.egress_addresses : "${address}/32"]
}

module "west" {
  source    = "../../modules/mesh"
  providers = { helm = helm.west, kubernetes = kubernetes.west }

  cluster        = "west"
  chart          = local.chart
  image          = var.image
  gateway_values = module.west_gateway.gateway_values
}

module "east" {
  source    = "../../modules/mesh"
  providers = { helm = helm.east, kubernetes = kubernetes.east }

  cluster        = "east"
  chart          = local.chart
  image          = var.image
  gateway_values = module.east_gateway.gateway_values
}

# Both sides' roots exist only once the federations run, so the link comes with a second apply.
module "peering" {
  count  = length(var.roots) == 0 ? 0 : 1
  source = "../../modules/peering"

  clusters = {
    west = {
      roots    = var.roots["west"]
      gateways = module.west_gateway.advertise
    }
    east = {
      roots    = var.roots["east"]
      gateways = module.east_gateway.advertise
      imports  = ["shop/*"]
    }
  }
}

module "vm" {
  source = "../../modules/vm-agent"

  cluster = "vm"
  program = var.program
  workloads = [{
    namespace       = "shop"
    service_account = "batch"
    outbound        = "127.0.0.1:15001"
  }]
  invitation = {
    secret  = "projects/${var.gcp_project}/secrets/${var.invitation_secret}"
    imports = ["shop/*"]
  }
}

resource "google_service_account" "vm" {
  account_id   = "tombolo-vm"
  display_name = "The machine vm, which may read its invitation and nothing else"
}

resource "google_secret_manager_secret_iam_member" "vm" {
  project   = var.gcp_project
  secret_id = var.invitation_secret
  role      = "roles/secretmanager.secretAccessor"
  member    = "serviceAccount:${google_service_account.vm.email}"
}

# It dials from here, so west can be opened to it alone.
resource "google_compute_address" "vm" {
  name         = "tombolo-vm"
  description  = "From where the machine vm dials"
  region       = var.gke.region
  address_type = "EXTERNAL"
}

resource "google_compute_instance" "vm" {
  #checkov:skip=CKV_GCP_38:The keys of Google Cloud encrypt the disk as they do everywhere
  #checkov:skip=CKV_GCP_40:It dials from an address of its own and nothing is opened for it

  name         = "tombolo-vm"
  machine_type = "e2-small"
  zone         = var.vm.zone
  metadata = {
    user-data              = module.vm.user_data
    block-project-ssh-keys = "true"
    enable-oslogin         = "true"
  }

  boot_disk {
    initialize_params {
      image = "ubuntu-os-cloud/ubuntu-2404-lts-amd64"
    }
  }

  network_interface {
    subnetwork = var.vm.subnetwork

    access_config {
      nat_ip = google_compute_address.vm.address
    }
  }

  service_account {
    email  = google_service_account.vm.email
    scopes = ["cloud-platform"]
  }

  shielded_instance_config {
    enable_secure_boot          = true
    enable_vtpm                 = true
    enable_integrity_monitoring = true
  }

  # Its keys are on its disk: a changed text must not end a cluster.
  lifecycle {
    ignore_changes = [boot_disk, metadata["user-data"]]
  }
}
