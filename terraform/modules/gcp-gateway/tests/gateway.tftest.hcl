mock_provider "google" {}

override_resource {
  target          = google_compute_address.tunnel
  override_during = plan
  values          = { address = "198.51.100.7" }
}

variables {
  name       = "east"
  region     = "europe-west1"
  network    = "prod"
  node_tags  = ["gke-east", "gateway"]
  peers_ipv4 = ["203.0.113.0/24", "192.0.2.7/32"]
}

run "by_address" {
  command = plan

  assert {
    condition     = length(google_dns_record_set.tunnel) == 0
    error_message = "no name was asked for"
  }

  assert {
    condition     = output.advertise == ["198.51.100.7:15443"] && output.addresses == ["198.51.100.7"]
    error_message = "peers must be told the address"
  }

  assert {
    condition     = google_compute_address.tunnel.network_tier == "PREMIUM" && output.gateway_values.gateway.service.annotations["cloud.google.com/network-tier"] == "Premium"
    error_message = "the tier is Premium unless said otherwise, at the address and at the load balancer alike"
  }
}

run "by_name" {
  command = plan

  variables {
    dns          = { managed_zone = "example-com", name = "gw.east.example.com" }
    tunnel_port  = 443
    network_tier = "STANDARD"
    labels       = { team = "mesh" }
  }

  assert {
    condition = (google_compute_address.tunnel.name == "east-tunnel"
      && google_compute_address.tunnel.description == "Tunnels between gateways, in front of east"
      && google_compute_address.tunnel.region == "europe-west1"
      && google_compute_address.tunnel.address_type == "EXTERNAL"
      && google_compute_address.tunnel.network_tier == "STANDARD"
    && google_compute_address.tunnel.labels == tomap({ team = "mesh" }))
    error_message = "a public address of the region"
  }

  assert {
    condition = (google_compute_firewall.tunnel.name == "east-tunnel"
      && google_compute_firewall.tunnel.description == "Tunnels to east"
      && google_compute_firewall.tunnel.network == "prod"
      && google_compute_firewall.tunnel.direction == "INGRESS"
      && google_compute_firewall.tunnel.source_ranges == toset(["203.0.113.0/24", "192.0.2.7/32"])
    && google_compute_firewall.tunnel.target_tags == toset(["gke-east", "gateway"]))
    error_message = "peers reach the gateways' nodes only"
  }

  assert {
    condition     = [for rule in google_compute_firewall.tunnel.allow : [rule.protocol, rule.ports]] == [["udp", tolist(["443"])]]
    error_message = "peers reach the tunnel's port by UDP, and nothing else"
  }

  assert {
    condition = (google_dns_record_set.tunnel[0].managed_zone == "example-com"
      && google_dns_record_set.tunnel[0].name == "gw.east.example.com."
      && google_dns_record_set.tunnel[0].type == "A"
      && google_dns_record_set.tunnel[0].ttl == 60
    && google_dns_record_set.tunnel[0].rrdatas == tolist(["198.51.100.7"]))
    error_message = "the name has the address"
  }

  assert {
    condition = jsonencode(output.gateway_values) == jsonencode({
      gateway = {
        advertise  = ["gw.east.example.com:443"]
        tunnelPort = 443
        service = {
          type                     = "LoadBalancer"
          loadBalancerIP           = "198.51.100.7"
          loadBalancerSourceRanges = ["203.0.113.0/24", "192.0.2.7/32"]
          externalTrafficPolicy    = "Local"
          annotations = {
            "cloud.google.com/l4-rbs"       = "enabled"
            "cloud.google.com/network-tier" = "Standard"
          }
        }
      }
    })
    error_message = "what the Service and the gateway are told"
  }
}
