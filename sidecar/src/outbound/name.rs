//! The names that are accepted here: `<service>.<namespace>.svc.clusterset.local[:port]`, and nothing else.

use tombolo_core::id::ServiceName;
use tombolo_core::refusal::Refusal;

use super::refuse::Refused;

const SUFFIX: &str = ".svc.clusterset.local";

/// Reads an authority. `port` is the one that the scheme implies.
pub fn parse(authority: &str, port: u16) -> Result<(ServiceName, u16), Refused> {
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, digits)) => (host, digits.parse::<u16>().ok().filter(|port| *port != 0)),
        None => (authority, Some(port)),
    };
    let port = port.ok_or_else(|| Refused::new(Refusal::BadRequest, format!("{authority:?} has no valid port")))?;
    let lower = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    let foreign = || {
        let shown: String = authority.chars().take(80).collect();
        Refused::new(Refusal::ForeignName, format!("{shown:?} is not <service>.<namespace>{SUFFIX}[:port]"))
    };
    let short = lower.strip_suffix(SUFFIX).ok_or_else(foreign)?;
    // `ServiceName` also reads namespace/name, which is no host name.
    if short.contains('/') {
        return Err(foreign());
    }
    Ok((short.parse().map_err(|_| foreign())?, port))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn clusterset_names_are_read() {
        for (text, service, port) in [
            ("web.shop.svc.clusterset.local", "shop/web", 80),
            ("web.shop.svc.clusterset.local:8080", "shop/web", 8080),
            ("Web.Shop.SVC.clusterset.local.:8080", "shop/web", 8080),
        ] {
            let (name, number) = parse(text, 80).unwrap();
            assert_eq!((name.to_string().as_str(), number), (service, port), "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for (text, refusal) in [
            ("example.com", Refusal::ForeignName),
            ("web.shop.svc.cluster.local", Refusal::ForeignName),
            ("svc.clusterset.local", Refusal::ForeignName),
            ("web.svc.clusterset.local", Refusal::ForeignName),
            ("a.web.shop.svc.clusterset.local", Refusal::ForeignName),
            ("shop/web.svc.clusterset.local", Refusal::ForeignName),
            ("127.0.0.1:80", Refusal::ForeignName),
            ("[::1]:80", Refusal::ForeignName),
            ("web.shop.svc.clusterset.local:0", Refusal::BadRequest),
            ("web.shop.svc.clusterset.local:http", Refusal::BadRequest),
            ("", Refusal::ForeignName),
        ] {
            assert_eq!(parse(text, 80).unwrap_err().refusal, refusal, "{text}");
        }
    }
}
