output "advertise" {
  description = "host:port at which peers dial this gateway: for `advertise` in its configuration, and for `gateways` of a ClusterPeer."
  value       = local.advertise
}

output "addresses" {
  description = "Public addresses of the gateway, in the order of the subnets."
  value       = aws_eip.tunnel[*].public_ip
}

output "gateway_values" {
  description = "Values of the Helm chart for this cluster's gateways: for `gateway_values` of the module mesh, or for `helm --values`."
  value = {
    gateway = {
      advertise  = local.advertise
      tunnelPort = var.tunnel_port
      adminPort  = var.health_port
      service = {
        type                  = "LoadBalancer"
        loadBalancerClass     = "service.k8s.aws/nlb"
        externalTrafficPolicy = "Local"
        annotations = {
          "service.beta.kubernetes.io/aws-load-balancer-scheme"               = "internet-facing"
          "service.beta.kubernetes.io/aws-load-balancer-nlb-target-type"      = "ip"
          "service.beta.kubernetes.io/aws-load-balancer-subnets"              = join(",", var.subnet_ids)
          "service.beta.kubernetes.io/aws-load-balancer-eip-allocations"      = join(",", aws_eip.tunnel[*].allocation_id)
          "service.beta.kubernetes.io/aws-load-balancer-security-groups"      = aws_security_group.load_balancer.id
          "service.beta.kubernetes.io/aws-load-balancer-healthcheck-protocol" = "http"
          "service.beta.kubernetes.io/aws-load-balancer-healthcheck-port"     = tostring(var.health_port)
          "service.beta.kubernetes.io/aws-load-balancer-healthcheck-path"     = "/readyz"
        }
      }
    }
    networkPolicy = {
      adminFrom = [for network in var.subnets_ipv4 : { ipBlock = { cidr = network } }]
    }
  }
}
