//! One CA for each of two clusters, and a certificate with a SPIFFE id for each of the four Envoys.

use std::fs;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};

/// (file name, SPIFFE id) by cluster.
const EAST: &[(&str, &str)] =
    &[("client-sidecar", super::config::CLIENT_SIDECAR), ("near-gateway", super::config::NEAR_GATEWAY)];
const WEST: &[(&str, &str)] =
    &[("server-sidecar", super::config::SERVER_SIDECAR), ("far-gateway", super::config::FAR_GATEWAY)];

/// Writes `<name>.pem` (chain), `<name>.key` and `bundle.pem` (both roots) into `folder`.
pub fn write(folder: &Path) -> anyhow::Result<()> {
    let mut bundle = String::new();
    for (cluster, members) in [("east", EAST), ("west", WEST)] {
        let mut params = CertificateParams::default();
        // Roots are looked up by their names: two must not share one.
        params.distinguished_name.push(DnType::CommonName, cluster);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let root = params.self_signed(&key)?;
        bundle.push_str(&root.pem());
        let issuer = Issuer::new(params, key);
        for (name, id) in members {
            leaf(folder, name, id, &issuer)?;
        }
    }
    fs::write(folder.join("bundle.pem"), bundle)?;
    Ok(())
}

fn leaf(folder: &Path, name: &str, id: &str, issuer: &Issuer<'_, KeyPair>) -> anyhow::Result<()> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
    let key = KeyPair::generate()?;
    fs::write(folder.join(format!("{name}.pem")), params.signed_by(&key, issuer)?.pem())?;
    fs::write(folder.join(format!("{name}.key")), key.serialize_pem())?;
    Ok(())
}
