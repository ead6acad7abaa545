//! What a link does to the packets of one direction, and how that is written.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};

/// The conditions of one direction. The default is a perfect link.
#[derive(Debug, Clone, PartialEq)]
pub struct Conditions {
    /// On every packet; a round trip takes that of both directions.
    pub delay: Duration,
    /// Added to the delay, uniform between nothing and this. The order of packets is kept.
    pub jitter: Duration,
    /// Share of the packets that are lost, 0 to 1.
    pub loss: f64,
    /// Mean number of packets lost in a row (Gilbert's model); 1 loses each by itself.
    pub loss_burst: f64,
    /// Bits per second; `None` for no limit.
    pub rate: Option<u64>,
    /// Octets that wait for the rate; what comes beyond is dropped.
    pub queue: u64,
    /// Nothing passes, and what was under way is lost.
    pub cut: bool,
    /// Nothing from or to these addresses passes.
    pub dark: BTreeSet<IpAddr>,
}

impl Default for Conditions {
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            loss_burst: 1.0,
            rate: None,
            queue: 2_500_000,
            cut: false,
            dark: BTreeSet::new(),
        }
    }
}

/// Which packets: those that leave one side, or all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    A,
    B,
    Both,
}

impl Conditions {
    /// Changes one condition, written as `delay-ms=20`, `loss=0.01`, `cut=on` or `dark=10.0.0.1`; with `a.` or
    /// `b.` in front, the side that it holds for.
    pub fn parse(text: &str) -> anyhow::Result<(Side, impl Fn(&mut Self))> {
        let (key, value) = text.split_once('=').with_context(|| format!("`{text}` is not KEY=VALUE"))?;
        let (side, key) = match key.split_once('.') {
            Some(("a", key)) => (Side::A, key),
            Some(("b", key)) => (Side::B, key),
            Some((side, _)) => bail!("there is no side `{side}`, only a and b"),
            None => (Side::Both, key),
        };
        let change = Change::parse(key, value).with_context(|| format!("`{text}`"))?;
        Ok((side, move |conditions: &mut Self| change.apply(conditions)))
    }
}

enum Change {
    Delay(Duration),
    Jitter(Duration),
    Loss(f64),
    LossBurst(f64),
    Rate(Option<u64>),
    Queue(u64),
    Cut(bool),
    Dark(IpAddr),
    Lit(IpAddr),
}

impl Change {
    fn parse(key: &str, value: &str) -> anyhow::Result<Self> {
        let number = |max: f64| {
            let number: f64 = value.parse().context("not a number")?;
            if (0.0..=max).contains(&number) { Ok(number) } else { bail!("not between 0 and {max}") }
        };
        let millis = || anyhow::Ok(Duration::from_secs_f64(number(60_000.0)? / 1000.0));
        Ok(match key {
            "delay-ms" => Self::Delay(millis()?),
            "jitter-ms" => Self::Jitter(millis()?),
            "loss" => Self::Loss(number(1.0)?),
            "loss-burst" => Self::LossBurst(number(1e6)?.max(1.0)),
            "rate-mbit" => Self::Rate(Some((number(1e6)? * 1e6) as u64).filter(|rate| *rate > 0)),
            "queue-kb" => Self::Queue((number(1e6)? * 1e3) as u64),
            "cut" if value == "on" => Self::Cut(true),
            "cut" if value == "off" => Self::Cut(false),
            "cut" => bail!("neither on nor off"),
            "dark" => Self::Dark(value.parse().context("not an IP address")?),
            "lit" => Self::Lit(value.parse().context("not an IP address")?),
            _ => bail!("there is no such condition"),
        })
    }

    fn apply(&self, conditions: &mut Conditions) {
        match self {
            Self::Delay(delay) => conditions.delay = *delay,
            Self::Jitter(jitter) => conditions.jitter = *jitter,
            Self::Loss(loss) => conditions.loss = *loss,
            Self::LossBurst(burst) => conditions.loss_burst = *burst,
            Self::Rate(rate) => conditions.rate = *rate,
            Self::Queue(queue) => conditions.queue = *queue,
            Self::Cut(cut) => conditions.cut = *cut,
            Self::Dark(address) => {
                conditions.dark.insert(*address);
            }
            Self::Lit(address) => {
                conditions.dark.remove(address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn conditions_are_changed_as_they_are_written() {
        let mut conditions = Conditions::default();
        for text in
            ["delay-ms=1.5", "loss=0.25", "rate-mbit=8", "queue-kb=10", "cut=on", "dark=10.0.0.1", "dark=fd00::1"]
        {
            let (side, change) = Conditions::parse(text).unwrap();
            assert_eq!(side, Side::Both);
            change(&mut conditions);
        }
        let want = Conditions {
            delay: Duration::from_micros(1500),
            loss: 0.25,
            rate: Some(8_000_000),
            queue: 10_000,
            cut: true,
            dark: ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()].into(),
            ..Conditions::default()
        };
        assert_eq!(conditions, want);
        for text in ["rate-mbit=0", "cut=off", "lit=10.0.0.1", "lit=fd00::1", "delay-ms=0", "loss=0", "queue-kb=2500"] {
            Conditions::parse(text).unwrap().1(&mut conditions);
        }
        assert_eq!(conditions, Conditions::default());
        assert_eq!(Conditions::parse("a.loss=1").unwrap().0, Side::A);
        assert_eq!(Conditions::parse("b.cut=on").unwrap().0, Side::B);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in
            ["", "loss", "loss=2", "loss=-1", "loss=NaN", "delay-ms=x", "c.loss=0", "cut=1", "dark=home", "speed=9"]
        {
            assert!(Conditions::parse(text).is_err(), "{text}");
        }
    }
}
