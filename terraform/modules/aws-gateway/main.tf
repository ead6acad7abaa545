# What a gateway in EKS needs of AWS: fixed addresses, a security group, a name. The load balancer itself belongs to
# the Kubernetes Service, which the AWS Load Balancer Controller reads; `gateway_values` says how that must look.

locals {
  advertise = var.dns == null ? [for address in aws_eip.tunnel : "${address.public_ip}:${var.tunnel_port}"] : ["${var.dns.name}:${var.tunnel_port}"]
}

resource "aws_eip" "tunnel" {
  #checkov:skip=CKV2_AWS_19:The load balancer controller attaches it to the load balancer that it makes

  count = length(var.subnet_ids)

  domain = "vpc"
  tags   = merge(var.tags, { Name = "${var.name}-tunnel-${count.index}" })
}

resource "aws_security_group" "load_balancer" {
  #checkov:skip=CKV2_AWS_5:The load balancer controller attaches it to the load balancer that it makes

  name        = "${var.name}-tunnel"
  description = "Tunnels between gateways, in front of ${var.name}"
  vpc_id      = var.vpc_id
  tags        = merge(var.tags, { Name = "${var.name}-tunnel" })
}

resource "aws_vpc_security_group_ingress_rule" "peers" {
  for_each = toset(var.peers_ipv4)

  security_group_id = aws_security_group.load_balancer.id
  description       = "Tunnels from ${each.value}"
  cidr_ipv4         = each.value
  ip_protocol       = "udp"
  from_port         = var.tunnel_port
  to_port           = var.tunnel_port
  tags              = var.tags
}

resource "aws_vpc_security_group_egress_rule" "tunnel" {
  security_group_id            = aws_security_group.load_balancer.id
  description                  = "Tunnels to the gateways"
  referenced_security_group_id = var.node_security_group_id
  ip_protocol                  = "udp"
  from_port                    = var.tunnel_port
  to_port                      = var.tunnel_port
  tags                         = var.tags
}

resource "aws_vpc_security_group_egress_rule" "health" {
  security_group_id            = aws_security_group.load_balancer.id
  description                  = "Health checks of the gateways"
  referenced_security_group_id = var.node_security_group_id
  ip_protocol                  = "tcp"
  from_port                    = var.health_port
  to_port                      = var.health_port
  tags                         = var.tags
}

# A load balancer that has a security group can be named by it, also where the client's address is kept.
resource "aws_vpc_security_group_ingress_rule" "node_tunnel" {
  security_group_id            = var.node_security_group_id
  description                  = "Tunnels to ${var.name}"
  referenced_security_group_id = aws_security_group.load_balancer.id
  ip_protocol                  = "udp"
  from_port                    = var.tunnel_port
  to_port                      = var.tunnel_port
  tags                         = var.tags
}

resource "aws_vpc_security_group_ingress_rule" "node_health" {
  security_group_id            = var.node_security_group_id
  description                  = "Health checks of ${var.name}"
  referenced_security_group_id = aws_security_group.load_balancer.id
  ip_protocol                  = "tcp"
  from_port                    = var.health_port
  to_port                      = var.health_port
  tags                         = var.tags
}

# The addresses are fixed, so the name has them: it needs no alias to a load balancer that does not exist yet.
resource "aws_route53_record" "tunnel" {
  count = var.dns == null ? 0 : 1

  zone_id = var.dns.zone_id
  name    = var.dns.name
  type    = "A"
  ttl     = 60
  records = aws_eip.tunnel[*].public_ip
}
