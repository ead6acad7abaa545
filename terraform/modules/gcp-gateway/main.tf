# What a gateway in GKE needs of Google Cloud: a fixed address, the firewall, a name. The load balancer itself, a passthrough
# one, belongs to the Kubernetes Service; `gateway_values` says how that must look.

locals {
  host      = var.dns == null ? google_compute_address.tunnel.address : var.dns.name
  advertise = ["${local.host}:${var.tunnel_port}"]
}

resource "google_compute_address" "tunnel" {
  name         = "${var.name}-tunnel"
  description  = "Tunnels between gateways, in front of ${var.name}"
  region       = var.region
  address_type = "EXTERNAL"
  network_tier = var.network_tier
  labels       = var.labels
}

# GKE writes such a rule by itself from loadBalancerSourceRanges, but not where the network is another project's.
resource "google_compute_firewall" "tunnel" {
  name          = "${var.name}-tunnel"
  description   = "Tunnels to ${var.name}"
  network       = var.network
  direction     = "INGRESS"
  source_ranges = var.peers_ipv4
  target_tags   = var.node_tags

  allow {
    protocol = "udp"
    ports    = [tostring(var.tunnel_port)]
  }
}

resource "google_dns_record_set" "tunnel" {
  count = var.dns == null ? 0 : 1

  managed_zone = var.dns.managed_zone
  name         = "${var.dns.name}."
  type         = "A"
  ttl          = 60
  rrdatas      = [google_compute_address.tunnel.address]
}
