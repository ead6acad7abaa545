output "peer_manifests" {
  description = "By cluster, the ClusterPeer that links it to the other one, as YAML for `kubectl apply`; empty without `roots`."
  value       = try(module.peering[0].manifests, {})
}

output "next_steps" {
  description = "What links the three, once they run."
  value       = <<-END
    The roots, for the variable of that name and a second apply:
      kubectl --context ${var.gke.context} -n ${module.west.namespace} get configmap tombolo-ca -o jsonpath='{.data.ca\.pem}'
      kubectl --context ${var.aks.context} -n ${module.east.namespace} get configmap tombolo-ca -o jsonpath='{.data.ca\.pem}'
    Then, in each of both clusters:
      terraform output -json peer_manifests | jq -r .west | kubectl --context ${var.gke.context} apply -f -
    For the machine, which asks its secret twice a minute:
      kubectl --context ${var.gke.context} -n ${module.west.namespace} exec deploy/tombolo-federation -- /tombolo peer invite --imports none --expires 1h > invitation
      gcloud secrets versions add ${var.invitation_secret} --project ${var.gcp_project} --data-file invitation
  END
}
