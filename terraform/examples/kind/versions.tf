terraform {
  required_version = ">= 1.11, < 2.0"

  required_providers {
    helm = {
      source  = "hashicorp/helm"
      version = ">= 3.0, < 4.0"
    }
    kubernetes = {
      source  = "hashicorp/kubernetes"
      version = ">= 3.0, < 4.0"
    }
  }
}

provider "helm" {
  alias      = "west"
  kubernetes = { config_path = var.kubeconfig, config_context = "kind-west" }
}

provider "helm" {
  alias      = "east"
  kubernetes = { config_path = var.kubeconfig, config_context = "kind-east" }
}

provider "kubernetes" {
  alias          = "west"
  config_path    = var.kubeconfig
  config_context = "kind-west"
}

provider "kubernetes" {
  alias          = "east"
  config_path    = var.kubeconfig
  config_context = "kind-east"
}
