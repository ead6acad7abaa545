mock_provider "azurerm" {}

mock_provider "google" {}

mock_provider "helm" {
  alias = "west"
}

mock_provider "helm" {
  alias = "east"
}

mock_provider "kubernetes" {
  alias = "west"
}

mock_provider "kubernetes" {
  alias = "east"
}

override_resource {
  target = module.west_gateway.google_compute_address.tunnel
  values = { address = "198.51.100.7" }
}

override_resource {
  target = module.east_gateway.azurerm_public_ip.tunnel
  values = { ip_address = "198.51.100.9" }
}

override_resource {
  target = google_compute_address.vm
  values = { address = "198.51.100.20" }
}

override_resource {
  target = google_service_account.vm
  values = { email = "tombolo-vm@mesh-123456.iam.gserviceaccount.com" }
}

variables {
  gcp_project = "mesh-123456"
  gke = {
    context          = "gke_west"
    region           = "europe-west1"
    network          = "prod"
    node_tags        = ["gke-west"]
    egress_addresses = ["203.0.113.1"]
  }
  azure_subscription_id = "01234567-89ab-cdef-0123-456789abcdef"
  aks = {
    context                = "aks_east"
    resource_group         = { id = "/subscriptions/0000/resourceGroups/mesh", name = "mesh", location = "westeurope" }
    principal_id           = "01234567-89ab-cdef-0123-456789abcdef"
    network_security_group = { name = "aks-nodes", resource_group_name = "aks" }
    egress_addresses       = ["203.0.113.9"]
  }
  image = {
    repository = "registry.example.com/tombolo"
    digest     = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
  }
  vm = {
    zone       = "europe-west1-b"
    subnetwork = "projects/mesh-123456/regions/europe-west1/subnetworks/prod"
  }
  invitation_secret = "invitation"
  program = {
    url    = "https://example.com/tombolo"
    sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
  }
}

run "installed" {
  command = apply

  assert {
    condition     = yamldecode(module.west.values[0]).cluster == "west" && yamldecode(module.east.values[0]).cluster == "east"
    error_message = "each cluster has its name"
  }

  assert {
    condition     = yamldecode(module.west.values[1]).gateway.advertise == ["198.51.100.7:15443"] && yamldecode(module.east.values[1]).gateway.advertise == ["198.51.100.9:15443"]
    error_message = "each says how it is dialled"
  }

  assert {
    condition     = yamldecode(module.west.values[1]).gateway.service.loadBalancerSourceRanges == ["203.0.113.9/32", "198.51.100.20/32"]
    error_message = "east and the machine may dial west, and nobody else"
  }

  assert {
    condition     = yamldecode(module.east.values[1]).gateway.service.loadBalancerSourceRanges == ["203.0.113.1/32"]
    error_message = "west may dial east, and nobody else"
  }

  assert {
    condition = (google_compute_instance.vm.metadata["user-data"] == module.vm.user_data
      && google_compute_instance.vm.network_interface[0].access_config[0].nat_ip == "198.51.100.20"
    && google_compute_instance.vm.service_account[0].email == "tombolo-vm@mesh-123456.iam.gserviceaccount.com")
    error_message = "the machine, with an identity and an address of its own"
  }

  assert {
    condition = (google_secret_manager_secret_iam_member.vm.secret_id == "invitation"
      && google_secret_manager_secret_iam_member.vm.role == "roles/secretmanager.secretAccessor"
    && google_secret_manager_secret_iam_member.vm.member == "serviceAccount:tombolo-vm@mesh-123456.iam.gserviceaccount.com")
    error_message = "which may read the invitation"
  }

  assert {
    condition     = output.peer_manifests == {} && strcontains(output.next_steps, "--context gke_west -n tombolo-system exec deploy/tombolo-federation")
    error_message = "no roots, no link; and what is next"
  }
}

run "linked" {
  command = apply

  variables {
    roots = {
      west = "-----BEGIN CERTIFICATE-----\nd2VzdA==\n-----END CERTIFICATE-----\n"
      east = "-----BEGIN CERTIFICATE-----\nZWFzdA==\n-----END CERTIFICATE-----\n"
    }
  }

  assert {
    condition     = yamldecode(output.peer_manifests.east).spec.gateways == ["198.51.100.7:15443"] && yamldecode(output.peer_manifests.west).spec.gateways == ["198.51.100.9:15443"]
    error_message = "each is told the other one's gateway"
  }

  assert {
    condition     = yamldecode(output.peer_manifests.east).spec.imports == ["shop/*"] && yamldecode(output.peer_manifests.west).spec.imports == []
    error_message = "only east brings something in"
  }
}
