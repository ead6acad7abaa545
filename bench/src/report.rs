//! What a bench says: medians with their spread, the ratio to each bar, and the file that keeps them. A
//! bar that is missed is written down as missed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde::Serialize;
use serde_json::Value;

use crate::host::{self, Machine};

/// The values of one figure over the runs.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Series {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    pub runs: Vec<f64>,
}

impl Series {
    pub fn push(&mut self, value: f64) {
        self.runs.push(round(value));
        let mut sorted = self.runs.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        self.median = match sorted.len() % 2 {
            1 => sorted[middle],
            _ => round((sorted[middle - 1] + sorted[middle]) / 2.0),
        };
        self.min = sorted[0];
        self.max = sorted[sorted.len() - 1];
    }
}

/// Four significant digits: what a loaded machine can tell.
fn round(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10_f64.powf(3.0 - value.abs().log10().floor());
    (value * scale).round() / scale
}

/// Figures by system, then by name with its unit.
pub type Figures = BTreeMap<String, BTreeMap<String, Series>>;

#[derive(Debug, Clone, Copy)]
pub enum Want {
    AtMost(f64),
    AtLeast(f64),
}

#[derive(Debug, Clone, Serialize)]
pub struct Bar {
    pub name: String,
    pub want: String,
    pub got: Option<f64>,
    pub pass: bool,
}

impl Bar {
    /// `got` is absent when it could not be measured, which is a miss.
    pub fn new(name: impl Into<String>, want: Want, got: Option<f64>) -> Self {
        let got = got.filter(|got| got.is_finite()).map(round);
        let (text, pass) = match want {
            Want::AtMost(most) => (format!("<= {most}"), got.is_some_and(|got| got <= most)),
            Want::AtLeast(least) => (format!(">= {least}"), got.is_some_and(|got| got >= least)),
        };
        Self { name: name.into(), want: text, got, pass }
    }
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub name: &'static str,
    pub commit: String,
    pub date: String,
    pub machine: Machine,
    pub versions: BTreeMap<&'static str, String>,
    /// How it was measured, in words and parameters.
    pub method: Value,
    pub figures: Figures,
    pub bars: Vec<Bar>,
}

impl Report {
    pub fn new(
        name: &'static str,
        method: Value,
        versions: BTreeMap<&'static str, String>,
        figures: Figures,
        bars: Vec<Bar>,
    ) -> anyhow::Result<Self> {
        Ok(Self { name, commit: commit(), date: date(), machine: host::machine()?, versions, method, figures, bars })
    }

    /// Prints the table and writes `<folder>/<name>.json`.
    pub fn publish(&self, folder: &Path) -> anyhow::Result<()> {
        print!("{}", self.table());
        std::fs::create_dir_all(folder)?;
        let path = folder.join(format!("{}.json", self.name));
        std::fs::write(&path, format!("{}\n", serde_json::to_string_pretty(self)?))?;
        println!("\nwritten to {}", path.display());
        Ok(())
    }

    /// A row for each figure and a column for each system, or the other way round if that is narrower.
    fn figure_rows(&self) -> Vec<Vec<String>> {
        let mut rows = vec![vec![String::new()]];
        rows[0].extend(self.figures.keys().cloned());
        let names: BTreeSet<&String> = self.figures.values().flat_map(BTreeMap::keys).collect();
        for name in names {
            let cells = self.figures.values().map(|figures| figures.get(name).map_or("-".to_owned(), cell));
            rows.push(std::iter::once(name.clone()).chain(cells).collect());
        }
        if rows[0].len() > rows.len() { turned(&rows) } else { rows }
    }

    fn table(&self) -> String {
        let rows = self.figure_rows();
        let processors = self.machine.processors;
        let mut text = format!("\n{} at {} on {processors} x {}\n", self.name, self.commit, self.machine.model);
        text.push_str(&aligned(&rows));
        let mut rows = vec![["bar", "want", "got", ""].map(str::to_owned).to_vec()];
        for bar in &self.bars {
            let got = bar.got.map_or("not measured".to_owned(), |got| got.to_string());
            let verdict = if bar.pass { "pass" } else { "MISS" };
            rows.push(vec![bar.name.clone(), bar.want.clone(), got, verdict.to_owned()]);
        }
        text.push('\n');
        text.push_str(&aligned(&rows));
        text
    }
}

/// Rows as columns.
fn turned(rows: &[Vec<String>]) -> Vec<Vec<String>> {
    (0..rows[0].len()).map(|column| rows.iter().map(|row| row[column].clone()).collect()).collect()
}

fn cell(series: &Series) -> String {
    if series.min == series.max {
        return series.median.to_string();
    }
    format!("{} ({} to {})", series.median, series.min, series.max)
}

fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("  {}\n", cells.join("   ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".into() };
    // What the bench itself writes does not make the measured tree dirty.
    let changed = git(&["status", "--porcelain", "--untracked-files=no", "--", ":!bench/results"]);
    if changed.is_none_or(|changed| changed.is_empty()) { commit } else { format!("{commit}-dirty") }
}

fn date() -> String {
    let output = Command::new("date").args(["-u", "+%Y-%m-%dT%H:%MZ"]).output();
    output.map_or_else(|_| "unknown".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_bars() {
        let mut series = Series::default();
        for value in [3.0, 1.0, 2.000_06] {
            series.push(value);
        }
        assert_eq!((series.median, series.min, series.max), (2.0, 1.0, 3.0));
        series.push(10.0);
        assert_eq!(series.median, 2.5);
        assert!(Bar::new("a", Want::AtMost(0.9), Some(0.9)).pass);
        assert!(!Bar::new("a", Want::AtLeast(1.05), Some(1.049)).pass);
        assert!(!Bar::new("a", Want::AtMost(0.9), None).pass);
        assert!(!Bar::new("a", Want::AtMost(0.9), Some(f64::NAN)).pass);
        assert_eq!(round(12_345.0), 12_350.0);
    }
}
