//! Moments and spans as people write them: RFC 3339, Unix milliseconds, `-1h`, `10s`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970 now.
pub(crate) fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

/// A span with its unit (`250ms`, `10s`, `5m`, `1h`, `7d`); a bare number is seconds.
///
/// # Errors
/// What is wrong with it, for a usage error.
pub(crate) fn parse_span(text: &str) -> Result<Duration, String> {
    let invalid = || format!("`{text}` is not a span of time; write 500ms, 10s, 5m, 1h or 7d");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().map_err(|_| invalid())?;
    let unit = match &text[digits..] {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => return Err(invalid()),
    };
    Duration::try_from_secs_f64(number * unit).map_err(|_| invalid())
}

/// What follows `@` in a position: RFC 3339, Unix milliseconds, or a span before now (`-1h`). Milliseconds
/// since 1970.
///
/// # Errors
/// What is wrong with it, for a usage error.
pub(crate) fn parse_moment(text: &str, now_ms: i64) -> Result<i64, String> {
    if let Some(span) = text.strip_prefix('-') {
        let span = parse_span(span)?;
        return Ok(now_ms.saturating_sub(i64::try_from(span.as_millis()).unwrap_or(i64::MAX)).max(0));
    }
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().map_err(|_| format!("`{text}` is too large for milliseconds since 1970"));
    }
    parse_rfc3339(text)
        .ok_or_else(|| format!("`{text}` is no time; write 2026-01-31T12:00:00Z, milliseconds since 1970, or -1h"))
}

/// RFC 3339 with its offset (`Z` or `+01:00`), to the millisecond; finer digits are cut.
fn parse_rfc3339(text: &str) -> Option<i64> {
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| -> Option<i64> {
        let field = bytes.get(from..to)?;
        field.iter().all(u8::is_ascii_digit).then(|| field.iter().fold(0, |n, d| n * 10 + i64::from(d - b'0')))
    };
    let sign_at = |at: usize, allowed: &[u8]| bytes.get(at).is_some_and(|byte| allowed.contains(byte));
    if !(sign_at(4, b"-") && sign_at(7, b"-") && sign_at(10, b"Tt ") && sign_at(13, b":") && sign_at(16, b":")) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if !(1..=12).contains(&month) || !(1..=days_in_month(year, month)).contains(&day) {
        return None;
    }
    // 60: a leap second, which Unix time does not count.
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut at = 19;
    let mut millis = 0;
    if sign_at(at, b".") {
        let digits = bytes[at + 1..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        if digits == 0 {
            return None;
        }
        let weight = [100, 10, 1];
        millis = (0..digits.min(3)).map(|i| i64::from(bytes[at + 1 + i] - b'0') * weight[i]).sum();
        at += 1 + digits;
    }
    let offset_minutes = match bytes.get(at)? {
        b'Z' | b'z' if bytes.len() == at + 1 => 0,
        sign @ (b'+' | b'-') if bytes.len() == at + 6 && sign_at(at + 3, b":") => {
            let (hours, minutes) = (number(at + 1, at + 3)?, number(at + 4, at + 6)?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            (hours * 60 + minutes) * if *sign == b'-' { -1 } else { 1 }
        }
        _ => return None,
    };
    let days = days_from_civil(year, month, day);
    Some((((days * 24 + hour) * 60 + minute - offset_minutes) * 60 + second) * 1_000 + millis)
}

fn days_in_month(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days since 1970-01-01 of a date in the proleptic Gregorian calendar. Years are counted from March, so that
/// the leap day is the last of its year.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// Milliseconds since 1970 as RFC 3339 in UTC.
pub(crate) fn rfc3339(ms: i64) -> String {
    let days = ms.div_euclid(86_400_000);
    let of_day = ms.rem_euclid(86_400_000);
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second, millis) =
        (of_day / 3_600_000, of_day / 60_000 % 60, of_day / 1_000 % 60, of_day % 1_000);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// A span for people: its two largest units.
pub(crate) fn span(ms: i64) -> String {
    let seconds = ms / 1_000;
    match seconds {
        ..1 => format!("{ms}ms"),
        1..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{}h{:02}m", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn moments() {
        let now = 1_700_000_000_000;
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29T12:34:56.789Z", 951_827_696_789),
            ("2000-02-29T12:34:56.7891234Z", 951_827_696_789),
            ("2024-01-01T01:00:00+01:00", 1_704_067_200_000),
            ("2023-12-31 19:00:00-05:00", 1_704_067_200_000),
            ("1704067200000", 1_704_067_200_000),
            ("-1h", now - 3_600_000),
            ("-1.5s", now - 1_500),
        ] {
            assert_eq!(parse_moment(text, now), Ok(expected), "{text}");
        }
        for text in [
            "",
            "now",
            "2024-02-30T00:00:00Z",
            "2024-01-01",
            "2024-01-01T00:00:00",
            "2024-01-01T24:00:00Z",
            "2024-01-01T00:00:00.Z",
            "2024-01-01T00:00:00+0100",
            "-1y",
            "-",
            "99999999999999999999",
        ] {
            assert!(parse_moment(text, now).is_err(), "{text}");
        }
    }

    #[test]
    fn spans() {
        for (text, ms) in [("10", 10_000), ("250ms", 250), ("1.5s", 1_500), ("5m", 300_000), ("7d", 604_800_000)] {
            assert_eq!(parse_span(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "1w", "-1s", "1e99d", "1.2.3s", "ten"] {
            assert!(parse_span(text).is_err(), "{text}");
        }
        assert_eq!(span(12), "12ms");
        assert_eq!(span(3_723_000), "1h02m");
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(ms in 0i64..253_402_300_799_999) {
            prop_assert_eq!(parse_moment(&rfc3339(ms), 0), Ok(ms));
        }
    }
}
