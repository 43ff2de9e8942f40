//! Patterns of topic names: regular expressions over whole names, compiled once, never larger than stated.

use std::collections::HashMap;
use std::sync::Arc;

use flowstone_protocol::{Error, ErrorCode};
use regex::{Regex, RegexBuilder};

/// Longest pattern, in bytes.
const PATTERN_BYTES_MAX: usize = 1 << 10;
/// What a pattern may take once it is compiled; repetitions of repetitions grow beyond all bounds.
const COMPILED_BYTES_MAX: usize = 1 << 20;
/// Compiled patterns that are kept.
const KEPT_MAX: usize = 1_000;

/// Compiles a pattern. Matching takes time linear in the name, whatever the pattern.
///
/// # Errors
/// `INVALID_PATTERN` for what is none, or explodes.
pub(crate) fn compile(pattern: &str) -> Result<Regex, Error> {
    let invalid = |why: String| Error::new(ErrorCode::InvalidPattern, why);
    if pattern.len() > PATTERN_BYTES_MAX {
        return Err(invalid(format!(
            "a topic pattern of {} bytes, and {PATTERN_BYTES_MAX} is the limit; write a shorter one, or name the topics",
            pattern.len()
        )));
    }
    RegexBuilder::new(&format!("^(?:{pattern})$"))
        .size_limit(COMPILED_BYTES_MAX)
        .dfa_size_limit(COMPILED_BYTES_MAX)
        .build()
        .map_err(|error| match error {
            regex::Error::CompiledTooBig(_) => invalid(format!(
                "the topic pattern takes more than {COMPILED_BYTES_MAX} bytes once it is compiled; write one with fewer \
                 repetitions, or name the topics"
            )),
            error => invalid(format!("the topic pattern is no regular expression: {error}; check its syntax")),
        })
}

/// Patterns that were compiled.
#[derive(Debug, Default)]
pub(crate) struct Patterns {
    kept: HashMap<String, Option<Arc<Regex>>>,
}

impl Patterns {
    /// Whether a topic of this name is meant. The cluster's own topics never are; nor is anything by a pattern that an
    /// older release took and this one does not.
    pub(crate) fn matches(&mut self, pattern: &str, topic: &str) -> bool {
        if pattern.is_empty() || topic.starts_with("__") {
            return false;
        }
        if !self.kept.contains_key(pattern) {
            if self.kept.len() >= KEPT_MAX {
                self.kept.clear();
            }
            self.kept.insert(pattern.to_owned(), compile(pattern).ok().map(Arc::new));
        }
        self.kept.get(pattern).and_then(Option::as_ref).is_some_and(|regex| regex.is_match(topic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_means_whole_names_of_users_topics() {
        let mut patterns = Patterns::default();
        for (pattern, topic, is_meant) in [
            ("orders", "orders", true),
            ("orders", "orders-2", false),
            ("orders.*", "orders-2", true),
            ("a|b", "b", true),
            ("a|b", "ab", false),
            (".*", "__consumer_offsets", false),
            ("", "orders", false),
            ("(", "orders", false),
        ] {
            assert_eq!(patterns.matches(pattern, topic), is_meant, "{pattern} {topic}");
        }
    }

    #[test]
    fn a_pattern_that_explodes_is_refused() {
        let refused = |pattern: &str, part: &str| {
            let error = compile(pattern).expect_err(part);
            assert_eq!(error.code, ErrorCode::InvalidPattern);
            assert!(error.message.contains(part), "{}", error.message);
        };
        refused("(((a{100}){100}){100}){100}", "repetitions");
        refused("[", "syntax");
        refused(&"(".repeat(400), "syntax");
        refused(&"a".repeat(2_000), "limit");
        // What makes other engines try for ever is answered at once here.
        assert!(!compile("(a+)+b").expect("small").is_match(&"a".repeat(249)));
    }
}
