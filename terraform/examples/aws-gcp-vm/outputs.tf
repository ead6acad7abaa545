output "west_address" {
  description = "Public address of the machine in AWS."
  value       = aws_eip.west.public_ip
}

output "next_steps" {
  description = "What links the two machines, once both run."
  value       = <<-END
    On west:
      sudo -u tombolo tombolo peer invite --imports none --expires 1h > invitation
    Wherever Google Cloud is signed in to, with that file:
      gcloud secrets versions add ${var.invitation_secret} --project ${var.gcp_project} --data-file invitation
    On east, within half a minute:
      curl -x http://127.0.0.1:15001 http://web.shop.svc.clusterset.local/
  END
}
