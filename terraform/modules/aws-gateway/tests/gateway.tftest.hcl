mock_provider "aws" {}

override_resource {
  target          = aws_eip.tunnel[0]
  override_during = plan
  values          = { public_ip = "198.51.100.1", allocation_id = "eipalloc-1" }
}

override_resource {
  target          = aws_eip.tunnel[1]
  override_during = plan
  values          = { public_ip = "198.51.100.2", allocation_id = "eipalloc-2" }
}

override_resource {
  target          = aws_security_group.load_balancer
  override_during = plan
  values          = { id = "sg-10adba1a" }
}

variables {
  name                   = "west"
  vpc_id                 = "vpc-0123456789abcdef0"
  subnet_ids             = ["subnet-aaaa1111", "subnet-bbbb2222"]
  subnets_ipv4           = ["10.0.0.0/20", "10.0.16.0/20"]
  node_security_group_id = "sg-0de50000"
  peers_ipv4             = ["203.0.113.0/24", "192.0.2.7/32"]
}

run "by_address" {
  command = plan

  assert {
    condition     = length(aws_route53_record.tunnel) == 0
    error_message = "no name was asked for"
  }

  assert {
    condition     = jsonencode(output.advertise) == jsonencode(["198.51.100.1:15443", "198.51.100.2:15443"])
    error_message = "peers must be told both addresses"
  }

  assert {
    condition     = jsonencode(output.addresses) == jsonencode(["198.51.100.1", "198.51.100.2"])
    error_message = "one address for each subnet"
  }
}

run "by_name" {
  command = plan

  variables {
    dns         = { zone_id = "Z0123456789", name = "gw.west.example.com" }
    tunnel_port = 443
    health_port = 8080
    tags        = { team = "mesh" }
  }

  assert {
    condition     = aws_eip.tunnel[1].domain == "vpc" && aws_eip.tunnel[1].tags == tomap({ team = "mesh", Name = "west-tunnel-1" })
    error_message = "an address of the VPC, named after the gateway"
  }

  assert {
    condition = (aws_security_group.load_balancer.vpc_id == "vpc-0123456789abcdef0"
      && aws_security_group.load_balancer.name == "west-tunnel"
      && aws_security_group.load_balancer.description == "Tunnels between gateways, in front of west"
    && aws_security_group.load_balancer.tags == tomap({ team = "mesh", Name = "west-tunnel" }))
    error_message = "the load balancer's security group, in the VPC"
  }

  # Whom each rule admits, and to what.
  assert {
    condition = { for network, rule in aws_vpc_security_group_ingress_rule.peers :
      network => [rule.security_group_id, rule.cidr_ipv4, rule.ip_protocol, rule.from_port, rule.to_port, rule.tags.team, rule.description]
      } == {
      "203.0.113.0/24" = ["sg-10adba1a", "203.0.113.0/24", "udp", 443, 443, "mesh", "Tunnels from 203.0.113.0/24"]
      "192.0.2.7/32"   = ["sg-10adba1a", "192.0.2.7/32", "udp", 443, 443, "mesh", "Tunnels from 192.0.2.7/32"]
    }
    error_message = "peers reach the tunnel's port by UDP, and nothing else"
  }

  assert {
    condition = { for rule in [
      aws_vpc_security_group_egress_rule.tunnel, aws_vpc_security_group_egress_rule.health,
      aws_vpc_security_group_ingress_rule.node_tunnel, aws_vpc_security_group_ingress_rule.node_health
      ] : rule.description => [rule.security_group_id, rule.referenced_security_group_id, rule.ip_protocol, rule.from_port, rule.to_port, rule.tags.team]
      } == {
      "Tunnels to the gateways"       = ["sg-10adba1a", "sg-0de50000", "udp", 443, 443, "mesh"]
      "Health checks of the gateways" = ["sg-10adba1a", "sg-0de50000", "tcp", 8080, 8080, "mesh"]
      "Tunnels to west"               = ["sg-0de50000", "sg-10adba1a", "udp", 443, 443, "mesh"]
      "Health checks of west"         = ["sg-0de50000", "sg-10adba1a", "tcp", 8080, 8080, "mesh"]
    }
    error_message = "the load balancer reaches the nodes on two ports, and nothing else"
  }

  assert {
    condition = (aws_route53_record.tunnel[0].zone_id == "Z0123456789"
      && aws_route53_record.tunnel[0].name == "gw.west.example.com"
      && aws_route53_record.tunnel[0].type == "A"
      && aws_route53_record.tunnel[0].ttl == 60
    && aws_route53_record.tunnel[0].records == toset(["198.51.100.1", "198.51.100.2"]))
    error_message = "the name has both addresses"
  }

  assert {
    condition = jsonencode(output.gateway_values) == jsonencode({
      gateway = {
        advertise  = ["gw.west.example.com:443"]
        tunnelPort = 443
        adminPort  = 8080
        service = {
          type                  = "LoadBalancer"
          loadBalancerClass     = "service.k8s.aws/nlb"
          externalTrafficPolicy = "Local"
          annotations = {
            "service.beta.kubernetes.io/aws-load-balancer-scheme"               = "internet-facing"
            "service.beta.kubernetes.io/aws-load-balancer-nlb-target-type"      = "ip"
            "service.beta.kubernetes.io/aws-load-balancer-subnets"              = "subnet-aaaa1111,subnet-bbbb2222"
            "service.beta.kubernetes.io/aws-load-balancer-eip-allocations"      = "eipalloc-1,eipalloc-2"
            "service.beta.kubernetes.io/aws-load-balancer-security-groups"      = "sg-10adba1a"
            "service.beta.kubernetes.io/aws-load-balancer-healthcheck-protocol" = "http"
            "service.beta.kubernetes.io/aws-load-balancer-healthcheck-port"     = "8080"
            "service.beta.kubernetes.io/aws-load-balancer-healthcheck-path"     = "/readyz"
          }
        }
      }
      networkPolicy = {
        adminFrom = [{ ipBlock = { cidr = "10.0.0.0/20" } }, { ipBlock = { cidr = "10.0.16.0/20" } }]
      }
    })
    error_message = "what the Service and the gateway are told"
  }
}
