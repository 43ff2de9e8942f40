//! The pages at the root name files that exist.

use std::path::Path;

/// What stands in backticks; code does not go over line ends.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// Where links point to.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split(')').next())
}

#[test]
fn files_and_links_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut named = 0;
    for page in
        ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "SECURITY.md", "docs/quickstart.md", "docs/concepts.md"]
    {
        let text = std::fs::read_to_string(root.join(page)).unwrap_or_else(|error| panic!("{page}: {error}"));
        for source in code(&text).filter(|code| code.ends_with(".rs") && !code.contains(' ')) {
            assert!(root.join(source).exists(), "{page} names {source}, which does not exist");
            named += 1;
        }
        let beside = root.join(page).parent().expect("a folder").to_owned();
        for link in links(&text).filter(|link| !link.contains("://")) {
            assert!(beside.join(link).exists(), "{page} links to {link}, which does not exist");
            named += 1;
        }
    }
    assert!(named > 30, "only {named} files are named: is this test still reading the pages?");
}
