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

run "what_the_roots_say_counts" {
  variables {
    clusters = {
      west = { roots = "Trust-Domain: west.example.com\nSequence: 7\n-----BEGIN CERTIFICATE-----\nd2VzdA==\n-----END CERTIFICATE-----\n-----BEGIN CERTIFICATE-----\nd2VzdDI=\n-----END CERTIFICATE-----\n" }
      east = { roots = "Trust-Domain: wrong.example.com\nSequence: 7\n-----BEGIN CERTIFICATE-----\nZWFzdA==\n-----END CERTIFICATE-----\n", trust_domain = "east.example.com", sequence = 9, gateways = ["gw:1"] }
    }
  }

  assert {
    condition = [for id in ["east", "west"] : merge(yamldecode(output.manifests[id]).spec.bundle, { trustDomain = yamldecode(output.manifests[id]).spec.trustDomain })] == [
      { trustDomain = "west.example.com", sequence = 7, roots = "-----BEGIN CERTIFICATE-----\nd2VzdA==\n-----END CERTIFICATE-----\n-----BEGIN CERTIFICATE-----\nd2VzdDI=\n-----END CERTIFICATE-----\n" },
      { trustDomain = "east.example.com", sequence = 9, roots = "-----BEGIN CERTIFICATE-----\nZWFzdA==\n-----END CERTIFICATE-----\n" },
    ]
    error_message = "certificates only, with the trust domain and sequence of their file, unless said otherwise"
  }
}
