variable "aws_region" {
  description = "Region of the machine in AWS."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.aws_region))
    error_message = "aws_region must be a region: eu-west-1."
  }
}

variable "aws_vpc_id" {
  description = "VPC of the machine in AWS."
  type        = string

  validation {
    condition     = can(regex("^vpc-[0-9a-f]+$", var.aws_vpc_id))
    error_message = "aws_vpc_id must be the id of a VPC: vpc-0123456789abcdef0."
  }
}

variable "aws_subnet_id" {
  description = "Public subnet of that VPC, in which the machine stands."
  type        = string

  validation {
    condition     = can(regex("^subnet-[0-9a-f]+$", var.aws_subnet_id))
    error_message = "aws_subnet_id must be the id of a subnet: subnet-0123456789abcdef0."
  }
}

variable "aws_ami_id" {
  description = "Image of the machine in AWS: Debian 12, Ubuntu 22.04 or a later one, for x86-64."
  type        = string

  validation {
    condition     = can(regex("^ami-[0-9a-f]+$", var.aws_ami_id))
    error_message = "aws_ami_id must be the id of an image: ami-0123456789abcdef0."
  }
}

variable "gcp_project" {
  description = "Project of what is made in Google Cloud."
  type        = string

  validation {
    condition     = can(regex("^[a-z][-a-z0-9]{4,28}[a-z0-9]$", var.gcp_project))
    error_message = "gcp_project must be a project's id, not its name or number."
  }
}

variable "gcp_zone" {
  description = "Zone of the machine in Google Cloud."
  type        = string

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+-[a-z]$", var.gcp_zone))
    error_message = "gcp_zone must be a zone: europe-west1-b."
  }
}

variable "gcp_subnetwork" {
  description = "Self link of the subnetwork in which the machine in Google Cloud stands."
  type        = string

  validation {
    condition     = can(regex("^(https://www.googleapis.com/compute/v1/)?projects/[^/]+/regions/[^/]+/subnetworks/[^/]+$", var.gcp_subnetwork))
    error_message = "gcp_subnetwork must be a self link: projects/PROJECT/regions/REGION/subnetworks/NAME."
  }
}

variable "invitation_secret" {
  description = "Name of the secret in Secret Manager, made before, into which the invitation is put by hand; only the machine in Google Cloud may read it."
  type        = string

  validation {
    condition     = can(regex("^[-_A-Za-z0-9]{1,255}$", var.invitation_secret))
    error_message = "invitation_secret must be the name of a secret, without its project."
  }
}

variable "program" {
  description = "Where the machines fetch the program `tombolo`, built for x86-64 Linux, and the SHA-256 that it must have."
  type = object({
    url    = string
    sha256 = string
  })

  validation {
    condition     = startswith(var.program.url, "https://")
    error_message = "program.url must be an https:// address."
  }
}
