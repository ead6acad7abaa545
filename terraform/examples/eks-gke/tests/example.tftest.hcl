mock_provider "aws" {}

mock_provider "google" {}

override_resource {
  target = module.west.aws_eip.tunnel[0]
  values = { public_ip = "198.51.100.1", allocation_id = "eipalloc-1" }
}

override_resource {
  target = module.east.google_compute_address.tunnel
  values = { address = "198.51.100.7" }
}

variables {
  aws_region = "eu-west-1"
  eks = {
    vpc_id                 = "vpc-0123456789abcdef0"
    public_subnet_ids      = ["subnet-aaaa1111"]
    public_subnets_ipv4    = ["10.0.0.0/20"]
    node_security_group_id = "sg-0de50000"
    egress_addresses       = ["192.0.2.1", "192.0.2.2"]
  }
  gcp_project = "mesh-123456"
  gke = {
    region           = "europe-west1"
    network          = "prod"
    node_tags        = ["gke-east"]
    egress_addresses = ["203.0.113.1"]
  }
}

run "before_the_federations_run" {
  command = apply

  assert {
    condition     = output.peer_manifests == {}
    error_message = "no roots, no links"
  }

  assert {
    condition     = output.gateway_values.east.gateway.service.loadBalancerSourceRanges == tolist(["192.0.2.1/32", "192.0.2.2/32"])
    error_message = "east admits west's nodes only"
  }

  assert {
    condition     = output.gateway_values.west.gateway.advertise == ["198.51.100.1:15443"] && output.gateway_values.west.networkPolicy.adminFrom == [{ ipBlock = { cidr = "10.0.0.0/20" } }]
    error_message = "west says where it is dialled, and its load balancer may ask for its health"
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
    condition     = yamldecode(output.peer_manifests.east).spec.gateways == ["198.51.100.1:15443"] && yamldecode(output.peer_manifests.west).spec.gateways == ["198.51.100.7:15443"]
    error_message = "each is told the other one's gateway"
  }

  assert {
    condition     = yamldecode(output.peer_manifests.east).spec.imports == ["shop/*"] && yamldecode(output.peer_manifests.west).spec.imports == []
    error_message = "only east brings something in"
  }
}
