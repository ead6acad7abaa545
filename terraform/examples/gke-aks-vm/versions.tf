terraform {
  required_version = ">= 1.11, < 2.0"

  required_providers {
    azurerm = {
      source  = "hashicorp/azurerm"
      version = ">= 5.0, < 6.0"
    }
    google = {
      source  = "hashicorp/google"
      version = ">= 8.0, < 9.0"
    }
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

provider "azurerm" {
  subscription_id = var.azure_subscription_id

  features {}
}

provider "google" {
  project = var.gcp_project
}

# `gcloud container clusters get-credentials` and `az aks get-credentials` write these contexts.
provider "helm" {
  alias      = "west"
  kubernetes = { config_path = var.kubeconfig, config_context = var.gke.context }
}

provider "helm" {
  alias      = "east"
  kubernetes = { config_path = var.kubeconfig, config_context = var.aks.context }
}

provider "kubernetes" {
  alias          = "west"
  config_path    = var.kubeconfig
  config_context = var.gke.context
}

provider "kubernetes" {
  alias          = "east"
  config_path    = var.kubeconfig
  config_context = var.aks.context
}
