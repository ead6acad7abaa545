//! What a value may be: exactly this, or what a regular expression matches.

use std::fmt;

use regex::bytes::{Regex, RegexBuilder};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Characters of one regular expression.
pub const PATTERN_MAX: usize = 1_024;
/// Memory of one compiled expression, and of its cache of states.
const COMPILED_MAX: usize = 256 * 1024;

/// A regular expression of the syntax of the `regex` crate (RE2's, without look-around), compiled once. It
/// must match the whole value; matching takes time linear in the value.
#[derive(Clone)]
pub struct Pattern {
    text: String,
    regex: Regex,
}

impl Pattern {
    /// # Errors
    /// When it is too long, too large, or not an expression, in words for its author.
    pub fn new(text: &str) -> Result<Self, String> {
        if text.len() > PATTERN_MAX {
            return Err(format!("the regular expression is longer than {PATTERN_MAX} octets"));
        }
        // Alone first: otherwise a stray parenthesis could end the group that anchors it.
        compiled(text)?;
        Ok(Self { text: text.into(), regex: compiled(&format!(r"\A(?:{text})\z"))? })
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn is_match(&self, value: &[u8]) -> bool {
        self.regex.is_match(value)
    }
}

fn compiled(text: &str) -> Result<Regex, String> {
    let built = RegexBuilder::new(text).size_limit(COMPILED_MAX).dfa_size_limit(COMPILED_MAX).build();
    built.map_err(|error| match error {
        regex::Error::CompiledTooBig(_) => "the regular expression is too large once compiled".to_owned(),
        // The parser draws the place on lines of its own; its last line is the reason.
        error => {
            let text = error.to_string();
            let reason = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
            format!("not a regular expression: {reason}")
        }
    })
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.text)
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// A header's or a parameter's value, or a gRPC name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ValueMatch {
    Exact(String),
    Regex(Pattern),
}

impl ValueMatch {
    pub fn is_match(&self, value: &[u8]) -> bool {
        match self {
            ValueMatch::Exact(want) => want.as_bytes() == value,
            ValueMatch::Regex(pattern) => pattern.is_match(value),
        }
    }

    pub fn as_str(&self) -> &str {
        match self {
            ValueMatch::Exact(text) => text,
            ValueMatch::Regex(pattern) => pattern.as_str(),
        }
    }
}

impl fmt::Display for ValueMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ValueMatch::Exact(text) => write!(f, "{text:?}"),
            ValueMatch::Regex(pattern) => write!(f, "{pattern:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn expressions_match_whole_values() {
        for (pattern, value, want) in [
            ("a|b", "a", true),
            ("a|b", "ab", false),
            ("/v[0-9]+/.*", "/v2/x", true),
            ("/v[0-9]+", "/v2/x", false),
            ("(?i)cart", "CART", true),
            ("", "", true),
            ("", "x", false),
            ("x", "x\n", false),
        ] {
            assert_eq!(Pattern::new(pattern).unwrap().is_match(value.as_bytes()), want, "{pattern} {value}");
        }
    }

    #[test]
    fn what_is_no_expression_or_costs_too_much_is_refused() {
        for (pattern, want) in [
            ("(", "not a regular expression: unclosed group"),
            ("a)|(b", "not a regular expression: unopened group"),
            ("(?=x)", "not a regular expression: look-around"),
            ("(a{1,1000}){1,1000}", "the regular expression is too large"),
        ] {
            let reason = Pattern::new(pattern).unwrap_err();
            assert!(reason.starts_with(want), "{pattern}: {reason}");
        }
        assert!(Pattern::new(&"x".repeat(PATTERN_MAX + 1)).is_err());
    }
}
