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

variables {
  west_node_address = "172.18.0.2"
}

run "installed" {
  command = apply

  assert {
    condition     = yamldecode(module.west.values[0]).cluster == "west" && yamldecode(module.east.values[0]).cluster == "east"
    error_message = "each cluster has its name"
  }

  assert {
    condition     = yamldecode(module.west.values[1]).gateway == { advertise = ["172.18.0.2:30443"], service = { type = "NodePort", nodePort = 30443 } }
    error_message = "west is dialled at its node"
  }

  assert {
    condition     = yamldecode(module.east.values[1]).gateway == { service = { enabled = false } }
    error_message = "east is not dialled"
  }

  assert {
    condition     = yamldecode(module.east.values[0]).image == { repository = "localhost/tombolo", tag = "dev", pullSecrets = [] } && yamldecode(module.east.values[2]).image == { pullPolicy = "Never" }
    error_message = "the image that was loaded"
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
    condition     = yamldecode(output.peer_manifests.east).spec.gateways == ["172.18.0.2:30443"] && yamldecode(output.peer_manifests.west).spec.gateways == []
    error_message = "east is told west's gateway, and has none itself"
  }
}
