variables {
  cluster = "west"
  program = {
    url    = "https://example.com/tombolo"
    sha256 = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
  }
}

run "alone" {
  assert {
    condition = yamldecode(output.agent_config) == {
      cluster   = "west"
      state     = "/var/lib/tombolo"
      directory = "/etc/tombolo/cluster"
      gateway   = { tunnel = "0.0.0.0:15443", advertise = [] }
      workloads = []
    }
    error_message = "a cluster without workloads that dials its peers"
  }

  assert {
    condition     = startswith(output.user_data, "#cloud-config\n")
    error_message = "cloud-init knows its files by their first line"
  }

  assert {
    condition = [for file in yamldecode(output.user_data).write_files : "${file.permissions} ${file.path}"] == [
      "0644 /etc/tombolo/agent.yaml",
      "0644 /etc/tombolo/program.env",
      "0755 /usr/local/sbin/tombolo-install",
      "0644 /etc/systemd/system/tombolo.service",
      "0644 /etc/tombolo/cluster/README",
    ]
    error_message = "nothing of an invitation where there is none"
  }

  assert {
    condition = yamldecode(output.user_data).runcmd == [
      ["/usr/local/sbin/tombolo-install"],
      ["systemctl", "daemon-reload"],
      ["systemctl", "enable", "--now", "--no-block", "tombolo.service"],
    ]
    error_message = "installed, then started"
  }
}

run "invited" {
  variables {
    tunnel_port = 443
    advertise   = ["gw.west.example.com:443"]
    workloads = [{
      namespace       = "shop"
      service_account = "web"
      outbound        = "127.0.0.1:15001"
      services        = [{ service = "shop/web", port = 80, app = "127.0.0.1:8080", protocol = "http" }, { service = "data/db", port = 5432, app = "127.0.0.1:5432" }]
    }]
    cluster_files = { "web.yaml" = "kind: Service\n" }
    invitation    = { secret = "projects/mesh-1/secrets/invitation", imports = ["shop/*", "data/db"] }
  }

  assert {
    condition = yamldecode(output.agent_config) == {
      cluster   = "west"
      state     = "/var/lib/tombolo"
      directory = "/etc/tombolo/cluster"
      gateway   = { tunnel = "0.0.0.0:443", advertise = ["gw.west.example.com:443"] }
      workloads = [{
        namespace      = "shop"
        serviceAccount = "web"
        sidecar = {
          outbound = "127.0.0.1:15001"
          services = [
            { service = "shop/web", port = 80, app = "127.0.0.1:8080", protocol = "http" },
            { service = "data/db", port = 5432, app = "127.0.0.1:5432", protocol = "opaque" },
          ]
        }
      }]
    }
    error_message = "what the agent is told"
  }

  assert {
    condition = { for file in yamldecode(output.user_data).write_files : file.path => file.content if contains(["/etc/tombolo/program.env", "/etc/tombolo/invitation.env", "/etc/tombolo/cluster/web.yaml", "/etc/tombolo/agent.yaml"], file.path) } == {
      "/etc/tombolo/program.env"      = "PROGRAM_URL='https://example.com/tombolo'\nPROGRAM_SHA256='00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff'\n"
      "/etc/tombolo/invitation.env"   = "INVITATION_SECRET='projects/mesh-1/secrets/invitation'\nINVITATION_IMPORTS='shop/*,data/db'\nINVITATION_EXPORTS='*'\n"
      "/etc/tombolo/cluster/web.yaml" = "kind: Service\n"
      "/etc/tombolo/agent.yaml"       = output.agent_config
    }
    error_message = "what the scripts are told"
  }

  assert {
    condition = [for file in yamldecode(output.user_data).write_files : "${file.permissions} ${file.path}" if length(regexall("accept", file.path)) > 0] == [
      "0755 /usr/local/sbin/tombolo-accept",
      "0644 /etc/systemd/system/tombolo-accept.service",
    ]
    error_message = "the script and the service that accept"
  }

  assert {
    condition     = yamldecode(output.user_data).runcmd[3] == ["systemctl", "enable", "--now", "--no-block", "tombolo-accept.service"]
    error_message = "the invitation is waited for by a service, not by the boot"
  }
}

run "nothing_is_brought_in_unless_said" {
  variables {
    invitation = { secret = "https://mesh.vault.azure.net/secrets/invitation", exports = ["shop/*"] }
  }

  assert {
    condition     = contains(yamldecode(output.user_data).write_files[*].content, "INVITATION_SECRET='https://mesh.vault.azure.net/secrets/invitation'\nINVITATION_IMPORTS='none'\nINVITATION_EXPORTS='shop/*'\n")
    error_message = "imports are none unless said"
  }
}
