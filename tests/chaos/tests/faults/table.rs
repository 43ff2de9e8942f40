//! The table of faults in `docs/testing.md`: each test that it names is there.

use std::collections::BTreeSet;
use std::path::Path;

#[test]
fn every_test_that_the_page_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("the workspace");
    let page = std::fs::read_to_string(root.join("docs/testing.md")).expect("the page");
    let named: BTreeSet<(&str, &str)> = page.split('`').filter_map(|word| word.split_once(".rs::")).collect();
    assert!(named.len() > 110, "{}", named.len());
    for (file, test) in named {
        let file = format!("{file}.rs");
        let text = std::fs::read_to_string(root.join(&file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        let at = text.find(&format!("fn {test}(")).unwrap_or_else(|| panic!("{file} has no {test}"));
        let before = &text[..at];
        // The attribute stands right before it, behind the end of whatever came earlier.
        let item = before.rsplit("\n\n").next().unwrap_or_default();
        assert!(item.contains("#[test]") || item.contains("#[tokio::test"), "{file}: {test} is no test");
    }
}
