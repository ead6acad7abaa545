output "advertise" {
  description = "host:port at which peers dial this gateway: for `advertise` in its configuration, and for `gateways` of a ClusterPeer."
  value       = local.advertise
}

output "addresses" {
  description = "Public addresses of the gateway, in the order of the subnets."
  value       = aws_eip.tunnel[*].public_ip
}

output "gateway_values" {
  description = "What Kubernetes must be told: `gateway`, fields of the gateway's configuration, and `service`, annotations and spec of the Service in front of it."
  value = {
    gateway = {
      tunnel    = "0.0.0.0:${var.tunnel_port}"
      advertise = local.advertise
      admin     = "0.0.0.0:${var.health_port}"
    }
    service = {
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
      spec = {
        type                  = "LoadBalancer"
        loadBalancerClass     = "service.k8s.aws/nlb"
        externalTrafficPolicy = "Local"
        ports = [{
          name       = "tunnel"
          protocol   = "UDP"
          port       = var.tunnel_port
          targetPort = var.tunnel_port
        }]
      }
    }
  }
}
