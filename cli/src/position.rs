//! Where in a partition reading begins and ends: `start`, `end`, an offset, `-N`, `@TIME`.

use crate::moment;

/// The value of `--from`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum From {
    /// The oldest record there is.
    Start,
    /// Only what comes from now on.
    End,
    /// This offset, in every partition.
    Offset(i64),
    /// The last so many data records of every partition.
    Last(u64),
    /// The first record of every partition that is at least as new, in milliseconds since 1970.
    Time(i64),
}

/// The value of `--until`; the record there is not printed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// The ends as they were when reading began.
    End,
    /// This offset, in every partition.
    Offset(i64),
    /// The first record of every partition that is at least as new, in milliseconds since 1970.
    Time(i64),
}

impl std::str::FromStr for From {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(time) = text.strip_prefix('@') {
            return Ok(From::Time(moment::parse_moment(time, moment::now_ms())?));
        }
        if let Some(count) = text.strip_prefix('-') {
            return count.parse().map(From::Last).map_err(|_| invalid(text, "start, end, an offset, -N or @TIME"));
        }
        match text {
            "start" => Ok(From::Start),
            "end" => Ok(From::End),
            _ => {
                parse_offset(text).map(From::Offset).ok_or_else(|| invalid(text, "start, end, an offset, -N or @TIME"))
            }
        }
    }
}

impl std::str::FromStr for Until {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(time) = text.strip_prefix('@') {
            return Ok(Until::Time(moment::parse_moment(time, moment::now_ms())?));
        }
        match text {
            "end" => Ok(Until::End),
            _ => parse_offset(text).map(Until::Offset).ok_or_else(|| invalid(text, "end, an offset or @TIME")),
        }
    }
}

fn parse_offset(text: &str) -> Option<i64> {
    text.parse().ok().filter(|offset| *offset >= 0)
}

fn invalid(text: &str, allowed: &str) -> String {
    format!("`{text}` is not a position; write {allowed}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions() {
        assert_eq!("start".parse(), Ok(From::Start));
        assert_eq!("end".parse(), Ok(From::End));
        assert_eq!("42".parse(), Ok(From::Offset(42)));
        assert_eq!("-42".parse(), Ok(From::Last(42)));
        assert_eq!("@1970-01-01T00:00:01Z".parse(), Ok(From::Time(1_000)));
        assert_eq!("@5".parse(), Ok(From::Time(5)));
        assert_eq!("end".parse(), Ok(Until::End));
        assert_eq!("7".parse(), Ok(Until::Offset(7)));
        for text in ["", "begin", "-", "--5", "-x", "@", "@x", "1.5", "+-1"] {
            assert!(text.parse::<From>().is_err(), "{text}");
        }
        for text in ["start", "-5", ""] {
            assert!(text.parse::<Until>().is_err(), "{text}");
        }
    }
}
