# User data that makes a machine a cluster of its own: `tombolo agent` under systemd. It holds nothing that is secret: keys are
# made on the machine, and of the invitation it has the name only.

locals {
  agent = {
    cluster   = var.cluster
    state     = "/var/lib/tombolo"
    directory = "/etc/tombolo/cluster"
    gateway = {
      tunnel    = "0.0.0.0:${var.tunnel_port}"
      advertise = var.advertise
    }
    workloads = [for workload in var.workloads : {
      namespace      = workload.namespace
      serviceAccount = workload.service_account
      sidecar = {
        outbound = workload.outbound
        services = workload.services
      }
    }]
  }

  files = concat(
    [
      { path = "/etc/tombolo/agent.yaml", permissions = "0644", content = yamlencode(local.agent) },
      { path = "/etc/tombolo/program.env", permissions = "0644", content = "PROGRAM_URL='${var.program.url}'\nPROGRAM_SHA256='${var.program.sha256}'\n" },
      { path = "/usr/local/sbin/tombolo-install", permissions = "0755", content = file("${path.module}/files/install") },
      { path = "/etc/systemd/system/tombolo.service", permissions = "0644", content = file("${path.module}/files/tombolo.service") },
      # The directory must be there even when it is empty.
      { path = "/etc/tombolo/cluster/README", permissions = "0644", content = "What this cluster is: Service, ServiceExport, ClusterPeer and policies, one or more to a .yaml file.\n" },
    ],
    [for name, text in var.cluster_files : { path = "/etc/tombolo/cluster/${name}", permissions = "0644", content = text }],
    var.invitation == null ? [] : [
      {
        path        = "/etc/tombolo/invitation.env"
        permissions = "0644"
        content     = "INVITATION_SECRET='${var.invitation.secret}'\nINVITATION_IMPORTS='${length(var.invitation.imports) == 0 ? "none" : join(",", var.invitation.imports)}'\nINVITATION_EXPORTS='${join(",", var.invitation.exports)}'\n"
      },
      { path = "/usr/local/sbin/tombolo-accept", permissions = "0755", content = file("${path.module}/files/accept") },
      { path = "/etc/systemd/system/tombolo-accept.service", permissions = "0644", content = file("${path.module}/files/tombolo-accept.service") },
    ],
  )

  units = concat(["tombolo.service"], var.invitation == null ? [] : ["tombolo-accept.service"])

  cloud_config = {
    packages    = ["ca-certificates", "curl", "jq"]
    write_files = local.files
    runcmd = concat(
      [["/usr/local/sbin/tombolo-install"], ["systemctl", "daemon-reload"]],
      # Not waited for: the second one tries until there is an invitation.
      [for unit in local.units : ["systemctl", "enable", "--now", "--no-block", unit]],
    )
  }
}
