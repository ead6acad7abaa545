mock_provider "aws" {}

mock_provider "google" {}

override_resource {
  target = aws_eip.west
  values = { public_ip = "198.51.100.1", allocation_id = "eipalloc-1" }
}

override_resource {
  target = google_service_account.east
  values = { email = "tombolo-east@mesh-123456.iam.gserviceaccount.com" }
}

override_resource {
  target = aws_security_group.west
  values = { id = "sg-1" }
}

override_resource {
  target = aws_instance.west
  values = { id = "i-1" }
}

variables {
  aws_region        = "eu-west-1"
  aws_vpc_id        = "vpc-0123"
  aws_subnet_id     = "subnet-0123"
  aws_ami_id        = "ami-0123"
  gcp_project       = "mesh-123456"
  gcp_zone          = "europe-west1-b"
  gcp_subnetwork    = "projects/mesh-123456/regions/europe-west1/subnetworks/prod"
  invitation_secret = "invitation"
  program = {
    url    = "https://example.com/tombolo"
    sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
  }
}

run "two_machines" {
  command = apply

  assert {
    condition     = yamldecode(module.west.agent_config).gateway == { tunnel = "0.0.0.0:15443", advertise = ["198.51.100.1:15443"] }
    error_message = "west says how it is dialled"
  }

  assert {
    condition     = yamldecode(module.east.agent_config).gateway.advertise == []
    error_message = "east can't be dialled"
  }

  assert {
    condition = (aws_vpc_security_group_ingress_rule.tunnel.ip_protocol == "udp"
      && aws_vpc_security_group_ingress_rule.tunnel.from_port == 15443
      && aws_vpc_security_group_ingress_rule.tunnel.to_port == 15443
    && aws_vpc_security_group_ingress_rule.tunnel.security_group_id == "sg-1")
    error_message = "one UDP port is open"
  }

  assert {
    condition = (aws_instance.west.user_data == module.west.user_data
      && aws_instance.west.vpc_security_group_ids == toset(["sg-1"])
      && aws_instance.west.metadata_options[0].http_tokens == "required"
    && aws_instance.west.root_block_device[0].encrypted)
    error_message = "the machine of west"
  }

  assert {
    condition     = aws_eip_association.west.allocation_id == "eipalloc-1" && aws_eip_association.west.instance_id == "i-1"
    error_message = "west has the address that it says"
  }

  assert {
    condition = (google_compute_instance.east.metadata["user-data"] == module.east.user_data
    && google_compute_instance.east.service_account[0].email == "tombolo-east@mesh-123456.iam.gserviceaccount.com")
    error_message = "the machine of east, with an identity of its own"
  }

  assert {
    condition = (google_secret_manager_secret_iam_member.east.secret_id == "invitation"
      && google_secret_manager_secret_iam_member.east.role == "roles/secretmanager.secretAccessor"
    && google_secret_manager_secret_iam_member.east.member == "serviceAccount:tombolo-east@mesh-123456.iam.gserviceaccount.com")
    error_message = "which may read the invitation"
  }

  assert {
    condition     = strcontains(module.east.user_data, "INVITATION_SECRET='projects/mesh-123456/secrets/invitation'") && !strcontains(module.west.user_data, "INVITATION")
    error_message = "only east is invited, and by the secret's name"
  }
}
