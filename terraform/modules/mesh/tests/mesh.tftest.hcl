mock_provider "helm" {}

mock_provider "kubernetes" {}

variables {
  cluster = "west"
  chart   = "../../../deploy/helm/tombolo"
  image = {
    repository = "registry.example.com/tombolo"
    digest     = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
  }
}

run "as_little_as_can_be_said" {
  command = plan

  assert {
    condition     = kubernetes_namespace_v1.tombolo.metadata[0].name == "tombolo-system" && kubernetes_namespace_v1.tombolo.metadata[0].labels == tomap({ "pod-security.kubernetes.io/enforce" = "restricted" })
    error_message = "a namespace whose pods are restricted"
  }

  assert {
    condition     = length(kubernetes_secret_v1.registry) == 0
    error_message = "no registry asks for a password"
  }

  assert {
    condition = (helm_release.tombolo.name == "tombolo"
      && helm_release.tombolo.namespace == "tombolo-system"
      && helm_release.tombolo.chart == "../../../deploy/helm/tombolo"
      && helm_release.tombolo.atomic == true
      && helm_release.tombolo.max_history == 10
    && helm_release.tombolo.timeout == 300)
    error_message = "a release that is taken back when its pods don't get ready"
  }

  assert {
    condition = jsonencode([for text in output.values : yamldecode(text)]) == jsonencode([
      {
        cluster     = "west"
        trustDomain = "west.tombolo"
        image = {
          repository  = "registry.example.com/tombolo"
          digest      = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
          pullSecrets = []
        }
        federation = { replicas = 2 }
        gateway    = { replicas = 2 }
      },
      {},
    ])
    error_message = "what the chart is told"
  }

  assert {
    condition     = output.namespace == "tombolo-system"
    error_message = "where it is"
  }
}

run "everything" {
  command = plan

  variables {
    trust_domain      = "west.example.com"
    namespace         = "mesh"
    image             = { repository = "localhost/tombolo", tag = "dev" }
    registry          = { server = "registry.example.com:5000", user = "nodes" }
    registry_password = "from the test"
    replicas          = 3
    gateway_values = {
      gateway       = { advertise = ["gw.west.example.com:15443"], service = { type = "NodePort" } }
      networkPolicy = { adminFrom = [{ ipBlock = { cidr = "10.0.0.0/20" } }] }
    }
    values                     = ["federation: {defaultAccess: deny}\n"]
    timeout_seconds            = 600
    registry_password_revision = 2
  }

  assert {
    condition = (kubernetes_secret_v1.registry[0].metadata[0].name == "tombolo-registry"
      && kubernetes_secret_v1.registry[0].metadata[0].namespace == "mesh"
      && kubernetes_secret_v1.registry[0].type == "kubernetes.io/dockerconfigjson"
    && kubernetes_secret_v1.registry[0].data_wo_revision == 2)
    error_message = "the Secret that fetches the image"
  }

  assert {
    condition     = kubernetes_secret_v1.registry[0].data_wo == null
    error_message = "the password is kept nowhere"
  }

  assert {
    condition     = helm_release.tombolo.namespace == "mesh" && helm_release.tombolo.timeout == 600
    error_message = "the release"
  }

  assert {
    condition = jsonencode([for text in output.values : yamldecode(text)]) == jsonencode([
      {
        cluster     = "west"
        trustDomain = "west.example.com"
        image       = { repository = "localhost/tombolo", tag = "dev", pullSecrets = ["tombolo-registry"] }
        federation  = { replicas = 3 }
        gateway     = { replicas = 3 }
      },
      {
        gateway       = { advertise = ["gw.west.example.com:15443"], service = { type = "NodePort" } }
        networkPolicy = { adminFrom = [{ ipBlock = { cidr = "10.0.0.0/20" } }] }
      },
      { federation = { defaultAccess = "deny" } },
    ])
    error_message = "what is said later counts over what is said before"
  }
}
