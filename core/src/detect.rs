//! What a connection speaks, told from its first octets, for ports of which nobody has said it.
//!
//! A shell looks at the octets without taking them, asks [`judge`] again whenever there are more, and takes the
//! connection for opaque bytes when there is no verdict in time: then its server speaks first, or its client is slow,
//! and bytes are right for both.

/// Octets that are looked at; what is not told apart by then is opaque. As large as the largest ClientHello that is read.
pub const OCTETS_MAX: usize = 16 * 1024;
/// What begins HTTP/2 with prior knowledge (RFC 9113 section 3.4).
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The longest registered method has 17 letters (`UPDATEREDIRECTREF`).
const METHOD_MAX: usize = 24;
/// Content type of a TLS record that begins a handshake (RFC 8446 section 5.1).
const HANDSHAKE: u8 = 22;

/// What a connection begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirstWord {
    /// A whole request line of HTTP/1.
    Http1,
    /// The whole connection preface of HTTP/2.
    Http2,
    /// A whole ClientHello.
    Tls { server_name: Option<String> },
    /// Nothing of these.
    Opaque,
}

impl FirstWord {
    pub fn name(&self) -> &'static str {
        match self {
            FirstWord::Http1 => "http1",
            FirstWord::Http2 => "http2",
            FirstWord::Tls { .. } => "tls",
            FirstWord::Opaque => "opaque",
        }
    }
}

/// What whoever can read TLS says about octets that begin like a handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hello {
    Whole { server_name: Option<String> },
    Partial,
    NotOne,
}

/// Judges all octets that came so far; `None` is for their beginning of something that more octets will tell.
pub fn judge(octets: &[u8], hello: impl FnOnce(&[u8]) -> Hello) -> Option<FirstWord> {
    let word = match octets.first()? {
        &HANDSHAKE => match hello(octets) {
            Hello::Whole { server_name } => Some(FirstWord::Tls { server_name }),
            Hello::Partial => None,
            Hello::NotOne => Some(FirstWord::Opaque),
        },
        _ if octets.starts_with(PREFACE) => Some(FirstWord::Http2),
        _ if PREFACE.starts_with(octets) => None,
        _ => request_line(octets),
    };
    word.or_else(|| (octets.len() >= OCTETS_MAX).then_some(FirstWord::Opaque))
}

/// `method SP request-target SP HTTP/1.x` (RFC 9112 section 3), told from text protocols that begin with a word, too.
fn request_line(octets: &[u8]) -> Option<FirstWord> {
    let opaque = Some(FirstWord::Opaque);
    let is_method = |octet: &u8| octet.is_ascii_uppercase() || *octet == b'-';
    let method = octets.iter().take_while(|octet| is_method(octet)).count();
    if method > METHOD_MAX {
        return opaque;
    }
    let (space, rest) = octets[method..].split_first()?;
    if method == 0 || *space != b' ' {
        return opaque;
    }
    // Octets above 0x7f are no part of a target, but servers take them, and refuse them with an answer.
    let target = rest.iter().take_while(|octet| **octet > b' ' && **octet != 0x7f).count();
    let (space, version) = rest[target..].split_first()?;
    if target == 0 || *space != b' ' {
        return opaque;
    }
    match version {
        [b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'0'..=b'9', b'\n', ..]
        | [b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'0'..=b'9', b'\r', b'\n', ..] => Some(FirstWord::Http1),
        [b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'0'..=b'9']
        | [b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'0'..=b'9', b'\r'] => None,
        _ if b"HTTP/1.".starts_with(version) => None,
        _ => opaque,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// For what can't be TLS.
    fn nobody(_: &[u8]) -> Hello {
        panic!("asked about octets that begin no handshake")
    }

    #[track_caller]
    fn check(octets: &[u8], want: Option<FirstWord>) {
        assert_eq!(judge(octets, nobody), want, "{:?}", String::from_utf8_lossy(octets));
    }

    #[test]
    fn whole_first_words_are_told_apart() {
        for line in [
            "GET / HTTP/1.1\r\n",
            "GET / HTTP/1.0\n",
            "OPTIONS * HTTP/1.1\r\nHost: x\r\n",
            "M-SEARCH http://x/ HTTP/1.1\r\n",
            "CONNECT db.data.svc.clusterset.local:5432 HTTP/1.1\r\n",
            "GET /\u{e4} HTTP/1.1\r\n",
        ] {
            check(line.as_bytes(), Some(FirstWord::Http1));
        }
        check(PREFACE, Some(FirstWord::Http2));
        check(&[&PREFACE[..], &[0, 0, 0, 4]].concat(), Some(FirstWord::Http2));
        for line in [
            "SSH-2.0-OpenSSH_9.9\r\n",
            "EHLO mail.example\r\n",
            "get key\r\n",
            "GET key\r\n",
            "SET key value\r\n",
            "PING\r\n",
            "*1\r\n$4\r\nPING\r\n",
            "GET  / HTTP/1.1\r\n",
            " GET / HTTP/1.1\r\n",
            "GET / HTTP/2.0\r\n",
            "GET / HTTP/1.x\r\n",
            "GET / HTTP/1.1 \r\n",
            "GET / HTTP/1.1\rX",
            "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
            "\u{0}\u{0}\u{0}\u{8}\u{4}",
            "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
            "-",
        ] {
            // A line that is cut off in its method may still become a request.
            let want = (line != "-").then_some(FirstWord::Opaque);
            check(line.as_bytes(), want);
        }
    }

    #[test]
    fn the_beginning_of_a_first_word_waits_for_the_rest() {
        check(b"", None);
        for whole in [&b"GET /cart?x=1 HTTP/1.1\r\n"[..], &PREFACE[..]] {
            for length in 0..whole.len() {
                check(&whole[..length], None);
            }
            assert!(judge(whole, nobody).is_some());
        }
    }

    #[test]
    fn what_begins_like_tls_is_for_others_to_read() {
        let record = [HANDSHAKE, 3, 1, 0, 5, 1];
        let name = Some("db.data.svc.clusterset.local".to_owned());
        let whole = Hello::Whole { server_name: name.clone() };
        assert_eq!(judge(&record, |_| whole), Some(FirstWord::Tls { server_name: name }));
        assert_eq!(judge(&record, |_| Hello::Partial), None);
        assert_eq!(judge(&record, |_| Hello::NotOne), Some(FirstWord::Opaque));
    }

    #[test]
    fn what_is_not_told_apart_at_the_limit_is_opaque() {
        let mut line = b"GET /".to_vec();
        line.resize(OCTETS_MAX - 1, b'x');
        check(&line, None);
        line.push(b'x');
        check(&line, Some(FirstWord::Opaque));
        let mut hello = vec![0; OCTETS_MAX];
        hello[0] = HANDSHAKE;
        assert_eq!(judge(&hello[1..], |_| Hello::Partial), Some(FirstWord::Opaque));
        assert_eq!(judge(&hello, |_| Hello::Partial), Some(FirstWord::Opaque));
    }

    proptest! {
        /// More octets never take back a verdict, so it does not matter how they arrive.
        #[test]
        fn a_verdict_stays(octets in proptest::collection::vec(any::<u8>(), 0..200), cut in 0_usize..200) {
            let octets = if octets.first() == Some(&HANDSHAKE) { vec![0] } else { octets };
            let early = judge(&octets[..cut.min(octets.len())], nobody);
            if early.is_some() {
                prop_assert_eq!(judge(&octets, nobody), early);
            }
        }

        /// The same for text, which comes nearer to a request line.
        #[test]
        fn a_verdict_about_text_stays(text in "[A-Z]{0,4} ?/?[a-z]{0,3} ?(HTTP)?(/1.)?1?\r?\n?.{0,4}", cut in 0_usize..40) {
            let octets = text.as_bytes();
            let early = judge(&octets[..cut.min(octets.len())], nobody);
            if early.is_some() {
                prop_assert_eq!(judge(octets, nobody), early);
            }
        }

        /// Noise is bytes; nothing panics, and what is called HTTP/1 is a request line.
        #[test]
        fn noise_is_opaque(octets in proptest::collection::vec(any::<u8>(), 32..64)) {
            let word = judge(&octets, |_| Hello::NotOne);
            if word == Some(FirstWord::Http1) {
                let line = octets.split(|octet| *octet == b'\n').next().unwrap();
                prop_assert!(line.windows(7).any(|part| part == b"HTTP/1."));
            }
            prop_assert_ne!(word, Some(FirstWord::Http2));
        }
    }
}
