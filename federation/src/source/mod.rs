//! Where the cluster's own services come from: a directory of Kubernetes-shaped YAML.
