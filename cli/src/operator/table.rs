//! Tables for a person: no lines, two spaces between columns, a header in capitals.

use comfy_table::{ContentArrangement, Table, presets};

pub fn print(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().map(|name| name.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    for line in table.lines() {
        anstream::println!("{}", line.trim_end());
    }
}

/// A list for one cell; a dash when it is empty.
pub fn list(items: &[String]) -> String {
    if items.is_empty() { "-".to_owned() } else { items.join(", ") }
}

/// Microseconds as milliseconds with one decimal.
pub fn millis(rtt_us: u32) -> String {
    format!("{:.1} ms", f64::from(rtt_us) / 1000.0)
}

/// How long ago, rounded for a person.
pub fn ago(silent_ms: i64) -> String {
    match u64::try_from(silent_ms) {
        Err(_) => "never".to_owned(),
        Ok(ms) if ms < 1000 => "now".to_owned(),
        Ok(ms) => format!("{} ago", humantime::format_duration(std::time::Duration::from_secs(ms / 1000))),
    }
}

/// A wall-clock time in UTC.
pub fn time(unix_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(unix_ms)
        .map_or_else(|_| "-".to_owned(), |time| time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string())
}
