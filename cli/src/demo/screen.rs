//! What the demo shows: numbered steps, facts under them, colour where the terminal has it.

use std::fmt::Display;
use std::time::Instant;

use anstyle::{AnsiColor, Style};

pub struct Screen {
    began: Instant,
    step: usize,
}

const GREEN: Style = Style::new().bold().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Green)));
const BLUE: Style = Style::new().bold().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Cyan)));
const DIM: Style = Style::new().dimmed();

impl Screen {
    pub fn new() -> Self {
        Self { began: Instant::now(), step: 0 }
    }

    /// A new step begins.
    pub fn step(&mut self, title: &str) {
        self.step += 1;
        let seconds = self.began.elapsed().as_secs_f64();
        anstream::println!("\n{BLUE}{}. {title}{BLUE:#}  {DIM}{seconds:.1} s{DIM:#}", self.step);
    }

    /// Something that was read from the running processes.
    pub fn fact(&self, label: &str, value: impl Display) {
        anstream::println!("   {label:<12} {value}");
    }

    /// A command as the operator would type it.
    pub fn command(&self, line: &str) {
        anstream::println!("   {DIM}$ {line}{DIM:#}");
    }

    /// The step's result.
    pub fn result(&self, text: impl Display) {
        anstream::println!("   {GREEN}✓{GREEN:#} {text}");
    }

    pub fn line(&self, text: impl Display) {
        anstream::println!("{text}");
    }
}
