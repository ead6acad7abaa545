# Two machines, each a cluster of its own. `west` in AWS serves shop/web and can be dialled; `east` in Google Cloud has no open port,
# dials west, and accepts west's invitation by itself once that is in its secret.

locals {
  tunnel_port = 15443
}

module "west" {
  source = "../../modules/vm-agent"

  cluster     = "west"
  program     = var.program
  tunnel_port = local.tunnel_port
  advertise   = ["${aws_eip.west.public_ip}:${local.tunnel_port}"]
  workloads = [{
    namespace       = "shop"
    service_account = "web"
    outbound        = "127.0.0.1:15001"
    services        = [{ service = "shop/web", port = 80, app = "127.0.0.1:8080", protocol = "http" }]
  }]
  cluster_files = { for name in ["service", "export"] : "${name}.yaml" => file("${path.module}/west/${name}.yaml") }
}

module "east" {
  source = "../../modules/vm-agent"

  cluster = "east"
  program = var.program
  workloads = [{
    namespace       = "shop"
    service_account = "frontend"
    outbound        = "127.0.0.1:15001"
  }]
  invitation = {
    secret  = "projects/${var.gcp_project}/secrets/${var.invitation_secret}"
    imports = ["shop/*"]
  }
}

resource "aws_eip" "west" {
  domain = "vpc"
  tags   = { Name = "tombolo-west" }
}

resource "aws_security_group" "west" {
  name        = "tombolo-west"
  description = "A machine that runs the tombolo agent"
  vpc_id      = var.aws_vpc_id
}

# Who dials from Google Cloud has no fixed address; the tunnel admits identities, not addresses.
resource "aws_vpc_security_group_ingress_rule" "tunnel" {
  security_group_id = aws_security_group.west.id
  description       = "Tunnels from other clusters"
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "udp"
  from_port         = local.tunnel_port
  to_port           = local.tunnel_port
}

resource "aws_vpc_security_group_egress_rule" "any" {
  security_group_id = aws_security_group.west.id
  description       = "Packages, the program, and tunnels to other clusters"
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "-1"
}

resource "aws_instance" "west" {
  #checkov:skip=CKV2_AWS_41:The machine calls no API of AWS and needs no right

  ami                    = var.aws_ami_id
  instance_type          = "t3.small"
  subnet_id              = var.aws_subnet_id
  vpc_security_group_ids = [aws_security_group.west.id]
  ebs_optimized          = true
  monitoring             = true
  user_data              = module.west.user_data
  tags                   = { Name = "tombolo-west" }

  metadata_options {
    http_endpoint = "enabled"
    http_tokens   = "required"
  }

  root_block_device {
    encrypted   = true
    volume_type = "gp3"
  }

  # Its keys are on its disk: a changed text must not end a cluster.
  lifecycle {
    ignore_changes = [ami, user_data]
  }
}

resource "aws_eip_association" "west" {
  allocation_id = aws_eip.west.allocation_id
  instance_id   = aws_instance.west.id
}

resource "google_service_account" "east" {
  account_id   = "tombolo-east"
  display_name = "The machine east, which may read its invitation and nothing else"
}

resource "google_secret_manager_secret_iam_member" "east" {
  project   = var.gcp_project
  secret_id = var.invitation_secret
  role      = "roles/secretmanager.secretAccessor"
  member    = "serviceAccount:${google_service_account.east.email}"
}

resource "google_compute_instance" "east" {
  #checkov:skip=CKV_GCP_38:The keys of Google Cloud encrypt the disk as they do everywhere
  #checkov:skip=CKV_GCP_40:It dials from an address of its own and nothing is opened for it

  name         = "tombolo-east"
  machine_type = "e2-small"
  zone         = var.gcp_zone
  metadata = {
    user-data              = module.east.user_data
    block-project-ssh-keys = "true"
    enable-oslogin         = "true"
  }

  boot_disk {
    initialize_params {
      image = "ubuntu-os-cloud/ubuntu-2404-lts-amd64"
    }
  }

  # An address of its own to dial from; nothing is opened for it.
  network_interface {
    subnetwork = var.gcp_subnetwork

    access_config {
      network_tier = "PREMIUM"
    }
  }

  service_account {
    email  = google_service_account.east.email
    scopes = ["cloud-platform"]
  }

  shielded_instance_config {
    enable_secure_boot          = true
    enable_vtpm                 = true
    enable_integrity_monitoring = true
  }

  lifecycle {
    ignore_changes = [boot_disk, metadata["user-data"]]
  }
}
