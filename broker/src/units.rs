//! Sizes and durations as people write them: `1 GiB`, `64KiB`, `7d`, `1h30m`, `250ms`.

use std::time::Duration;

const SIZE_UNITS: [(&str, u64); 10] = [
    ("b", 1),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("", 1),
];

/// Units of duration in milliseconds, largest first.
const DURATION_UNITS: [(&str, u64); 6] =
    [("w", 604_800_000), ("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Bytes from `"1 GiB"`, `"1048576"`, `"10MB"`. Binary and decimal units are told apart.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let (number, unit) = split_number(text)
        .ok_or_else(|| format!("`{text}` is no size; write a number with a unit, as in `64 KiB` or `1 GiB`"))?;
    let unit = unit.to_ascii_lowercase();
    let factor = SIZE_UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .map(|(_, factor)| *factor)
        .ok_or_else(|| format!("`{unit}` is no unit of size; use B, KB, MB, GB, TB, KiB, MiB, GiB or TiB"))?;
    number.checked_mul(factor).ok_or_else(|| format!("`{text}` is too large"))
}

/// A duration from `"7d"`, `"1h30m"`, `"250ms"`, `"0"`. A bare number other than 0 is refused: it has no unit.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let mut rest = text.trim();
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    let complaint =
        || format!("`{text}` is no duration; write a number with a unit, as in `250ms`, `30s`, `10m`, `7d`");
    if rest.is_empty() {
        return Err(complaint());
    }
    let mut total_ms: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = rest[..digits].parse().map_err(|_| complaint())?;
        rest = rest[digits..].trim_start();
        let letters = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let unit = rest[..letters].to_ascii_lowercase();
        rest = rest[letters..].trim_start();
        let factor = DURATION_UNITS.iter().find(|(name, _)| *name == unit).map(|(_, ms)| *ms).ok_or_else(complaint)?;
        total_ms = number
            .checked_mul(factor)
            .and_then(|ms| total_ms.checked_add(ms))
            .ok_or_else(|| format!("`{text}` is too long"))?;
    }
    Ok(Duration::from_millis(total_ms))
}

/// The shortest exact form: `64 KiB`, `1 GiB`, `1000`.
pub(crate) fn show_bytes(bytes: u64) -> String {
    for (name, factor) in [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if bytes >= factor && bytes.is_multiple_of(factor) {
            return format!("{} {name}", bytes / factor);
        }
    }
    bytes.to_string()
}

/// The shortest exact form in one unit: `7d`, `90m`, `250ms`.
pub(crate) fn show_duration(duration: Duration) -> String {
    let ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if ms == 0 {
        return "0".to_owned();
    }
    let (name, factor) =
        DURATION_UNITS.iter().skip(1).find(|(_, factor)| ms.is_multiple_of(*factor)).copied().unwrap_or(("ms", 1));
    format!("{}{name}", ms / factor)
}

fn split_number(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let digits = text.bytes().take_while(|byte| byte.is_ascii_digit() || *byte == b'_').count();
    let number = text[..digits].replace('_', "").parse().ok()?;
    Some((number, text[digits..].trim()))
}

/// The known name nearest to `unknown`, if one is near enough that it may have been meant.
pub(crate) fn did_you_mean<'a>(unknown: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|name| (edit_distance(unknown, name), name))
        .min()
        .filter(|(distance, name)| *distance <= 2.max(name.len() / 3))
        .map(|(_, name)| name)
}

/// Levenshtein's distance over bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let check = |text: &str, want: Option<u64>| assert_eq!(parse_bytes(text).ok(), want, "{text}");
        check("1 GiB", Some(1 << 30));
        check("1gib", Some(1 << 30));
        check("64KiB", Some(65_536));
        check("10 MB", Some(10_000_000));
        check("1_000", Some(1_000));
        check("1.5 GiB", None);
        check("GiB", None);
        check("-1", None);
        check("1 parsec", None);
        check("99999999999 TiB", None);
    }

    #[test]
    fn durations() {
        let check = |text: &str, want: Option<u64>| {
            assert_eq!(parse_duration(text).ok().map(|d| d.as_millis() as u64), want, "{text}");
        };
        check("7d", Some(604_800_000));
        check("1h30m", Some(5_400_000));
        check("250 ms", Some(250));
        check("0", Some(0));
        check("5", None);
        check("", None);
        check("h", None);
        check("5 fortnights", None);
        check("99999999999999999w", None);
    }

    #[test]
    fn shown_values_parse_back() {
        for bytes in [0, 1, 1_000, 1_024, 65_536, 1 << 30, (1 << 30) + 1] {
            assert_eq!(parse_bytes(&show_bytes(bytes)), Ok(bytes));
        }
        for ms in [0, 1, 250, 1_000, 90_000, 5_400_000, 604_800_000] {
            let duration = Duration::from_millis(ms);
            assert_eq!(parse_duration(&show_duration(duration)), Ok(duration));
        }
    }

    #[test]
    fn suggestions_are_near_or_none() {
        let known = ["node.data_dir", "listen.client"];
        assert_eq!(did_you_mean("node.datadir", known), Some("node.data_dir"));
        assert_eq!(did_you_mean("listen.clients", known), Some("listen.client"));
        assert_eq!(did_you_mean("zzz", known), None);
    }
}
