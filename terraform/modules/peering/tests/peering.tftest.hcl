variables {
  clusters = {
    west = {
      roots        = "-----BEGIN CERTIFICATE-----\nd2VzdA==\n-----END CERTIFICATE-----\n"
      trust_domain = "west.example.com"
      sequence     = 3
      gateways     = ["gw.west.example.com:15443"]
      exports      = ["shop/web"]
    }
    east = {
      roots   = "-----BEGIN CERTIFICATE-----\nZWFzdA==\n-----END CERTIFICATE-----\n"
      imports = ["shop/*"]
    }
  }
}

run "each_is_told_of_the_other" {
  assert {
    condition = { for id, manifest in output.manifests : id => yamldecode(manifest) } == {
      east = {
        apiVersion = "tombolo.dev/v1alpha1"
        kind       = "ClusterPeer"
        metadata   = { name = "west" }
        spec = {
          cluster     = "west"
          trustDomain = "west.example.com"
          bundle      = { roots = "-----BEGIN CERTIFICATE-----\nd2VzdA==\n-----END CERTIFICATE-----\n", sequence = 3 }
          gateways    = ["gw.west.example.com:15443"]
          exports     = ["*"]
          imports     = ["shop/*"]
        }
      }
      west = {
        apiVersion = "tombolo.dev/v1alpha1"
        kind       = "ClusterPeer"
        metadata   = { name = "east" }
        spec = {
          cluster     = "east"
          trustDomain = "east.tombolo"
          bundle      = { roots = "-----BEGIN CERTIFICATE-----\nZWFzdA==\n-----END CERTIFICATE-----\n", sequence = 0 }
          gateways    = []
          exports     = ["shop/web"]
          imports     = []
        }
      }
    }
    error_message = "each cluster's ClusterPeer has the other one's roots and gateways, and its own grants"
  }
}
