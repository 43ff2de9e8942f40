//! What commands print: one value in five forms. Data goes to stdout, everything else to stderr.

use crate::failure::{Failure, Outcome};
use clap::ValueEnum;
use serde::Serialize;
use std::io::{self, Write};

/// The value of `-o`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For reading; columns may be added.
    #[default]
    Table,
    /// A table with more columns.
    Wide,
    /// For programs; lists are arrays, fields may be added and never change their meaning.
    Json,
    /// As json.
    Yaml,
    /// Names alone, one a line.
    Name,
}

/// Something that `-o` can print.
pub(crate) trait Shown: Serialize {
    /// For `table` and `wide`.
    fn table(&self, wide: bool) -> String;
    /// For `name`.
    fn name(&self) -> String;
}

/// Prints one thing.
pub(crate) fn print(format: Format, shown: &impl Shown) -> Outcome {
    let text = match format {
        Format::Table => shown.table(false),
        Format::Wide => shown.table(true),
        Format::Json => {
            serde_json::to_string_pretty(shown).map_err(|error| Failure::failed(format!("json: {error}")))?
        }
        Format::Yaml => serde_saphyr::to_string(shown).map_err(|error| Failure::failed(format!("yaml: {error}")))?,
        Format::Name => shown.name(),
    };
    let mut out = io::stdout().lock();
    let text = text.trim_end_matches('\n');
    let written = if text.is_empty() { Ok(()) } else { writeln!(out, "{text}") };
    written.and_then(|()| out.flush()).map_err(Failure::from_stdout)
}

/// A row of a list.
pub(crate) trait Row: Serialize {
    /// Headings; the first `narrow` of them make the narrow table.
    const HEADINGS: &'static [&'static str];
    /// How many columns the narrow table has.
    const NARROW: usize;
    /// As many cells as headings.
    fn cells(&self) -> Vec<String>;
    /// For `-o name`.
    fn name(&self) -> String;
}

/// A list, in JSON an array.
#[derive(Serialize)]
#[serde(transparent)]
pub(crate) struct List<T>(pub(crate) Vec<T>);

impl<T: Row> Shown for List<T> {
    fn table(&self, wide: bool) -> String {
        table_of(&self.0, wide)
    }

    fn name(&self) -> String {
        self.0.iter().map(Row::name).collect::<Vec<_>>().join("\n")
    }
}

/// Rows under their headings; without rows the headings alone.
pub(crate) fn table_of<T: Row>(rows: &[T], wide: bool) -> String {
    let columns = if wide { T::HEADINGS.len() } else { T::NARROW };
    let headings = T::HEADINGS[..columns].iter().map(|heading| (*heading).to_owned()).collect();
    let cells = rows.iter().map(|row| row.cells().into_iter().take(columns).collect());
    aligned(&std::iter::once(headings).chain(cells).collect::<Vec<_>>())
}

/// Names and values, one pair a line.
pub(crate) fn pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, String)>) -> String {
    aligned(&pairs.into_iter().map(|(name, value)| vec![format!("{name}:"), value]).collect::<Vec<_>>())
}

/// Columns two spaces apart and nothing else: tables are read by `awk` as often as by people.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Prints a line beside what [`print()`] printed.
pub(crate) fn print_line(line: &str) -> Outcome {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(Failure::from_stdout)
}

/// Ids, separated by commas; `-` for none.
pub(crate) fn numbers(ids: &[i32]) -> String {
    if ids.is_empty() { "-".to_owned() } else { ids.iter().map(i32::to_string).collect::<Vec<_>>().join(",") }
}

/// The id of a broker, where there is one.
pub(crate) fn or_none(id: Option<i32>) -> String {
    id.map_or_else(|| "none".to_owned(), |id| id.to_string())
}

/// Bytes for people, in powers of 1024.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Topic {
        name: &'static str,
        partitions: i32,
        id: &'static str,
    }
    impl Row for Topic {
        const HEADINGS: &'static [&'static str] = &["NAME", "PARTITIONS", "ID"];
        const NARROW: usize = 2;
        fn cells(&self) -> Vec<String> {
            vec![self.name.to_owned(), self.partitions.to_string(), self.id.to_owned()]
        }
        fn name(&self) -> String {
            self.name.to_owned()
        }
    }

    #[test]
    fn lists() {
        let list =
            List(vec![Topic { name: "a", partitions: 12, id: "x" }, Topic { name: "long", partitions: 1, id: "y" }]);
        assert_eq!(list.table(false), "NAME  PARTITIONS\na     12\nlong  1\n");
        assert_eq!(list.table(true), "NAME  PARTITIONS  ID\na     12          x\nlong  1           y\n");
        assert_eq!(list.name(), "a\nlong");
        assert_eq!(serde_json::to_string(&list).expect("json").chars().next(), Some('['));
        assert_eq!(serde_saphyr::to_string(&List(Vec::<Topic>::new())).expect("yaml").trim(), "[]");
        assert_eq!(List(Vec::<Topic>::new()).table(false), "NAME  PARTITIONS\n");
    }

    #[test]
    fn sizes() {
        for (count, text) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")] {
            assert_eq!(bytes(count), text);
        }
    }
}
