# tombolo in one Kubernetes cluster: a namespace, the Helm release, and where a registry asks for one, the Secret to fetch the image
# with. The providers `helm` and `kubernetes` are those of that cluster.

locals {
  image = { for name, value in var.image : name => value if value != "" }

  # The fields that differ from the chart's own.
  values = {
    cluster     = var.cluster
    trustDomain = coalesce(var.trust_domain, "${var.cluster}.tombolo")
    image       = merge(local.image, { pullSecrets = kubernetes_secret_v1.registry[*].metadata[0].name })
    federation  = { replicas = var.replicas }
    gateway     = { replicas = var.replicas }
  }
}

resource "kubernetes_namespace_v1" "tombolo" {
  metadata {
    name = var.namespace
    labels = {
      "pod-security.kubernetes.io/enforce" = "restricted"
    }
  }
}

resource "kubernetes_secret_v1" "registry" {
  count = var.registry == null ? 0 : 1

  metadata {
    name      = "tombolo-registry"
    namespace = kubernetes_namespace_v1.tombolo.metadata[0].name
  }

  type             = "kubernetes.io/dockerconfigjson"
  data_wo_revision = var.registry_password_revision
  data_wo = {
    ".dockerconfigjson" = jsonencode({
      auths = { (var.registry.server) = { username = var.registry.user, password = var.registry_password } }
    })
  }
}

resource "helm_release" "tombolo" {
  name      = "tombolo"
  chart     = var.chart
  namespace = kubernetes_namespace_v1.tombolo.metadata[0].name
  values    = concat([yamlencode(local.values), yamlencode(var.gateway_values)], var.values)

  atomic      = true
  max_history = 10
  timeout     = var.timeout_seconds
}
