//! Rules about the tree itself: sizes, names that must exist, words that must not.
//!
//! Every rule is a function from files to complaints, and is itself tested on files that break it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// A source file longer than this is two files.
const MAX_LINES: usize = 500;
/// Fewer text files than this means that the walk looked in the wrong place.
const MIN_FILES: usize = 60;

/// A text file of the project, by its path from the root with `/` between parts.
#[derive(Debug)]
struct File {
    path: String,
    text: String,
}

impl File {
    fn is(&self, extensions: &[&str]) -> bool {
        extensions.iter().any(|e| self.path.ends_with(&format!(".{e}")))
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every text file that is part of the project; build products, caches and binary files are not.
fn files() -> Vec<File> {
    let root = root();
    let (mut files, mut folders) = (Vec::new(), vec![root.clone()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let anywhere = ["target", "node_modules", ".git", "Cargo.lock"];
            let on_top = folder == root && ["dist", "demo", "site"].contains(&name.as_str());
            if on_top || anywhere.contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(text) = fs::read_to_string(&path) {
                let path = path.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
                files.push(File { path, text });
            }
        }
    }
    assert!(files.len() >= MIN_FILES, "only {} files found", files.len());
    files
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// No complaints, or a panic that lists them all.
fn none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

fn too_long(files: &[File]) -> Vec<String> {
    let long = files.iter().filter(|f| f.is(&["rs", "wgsl", "cu"])).map(|f| (f, f.text.lines().count()));
    long.filter(|(_, n)| *n > MAX_LINES)
        .map(|(f, n)| format!("{}: {n} lines, more than {MAX_LINES}", f.path))
        .collect()
}

/// Lines that hold one of `words`; a word that begins with `/` only where a path begins.
fn holding(files: &[File], words: &[&str]) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files {
        for (number, line) in file.text.lines().enumerate() {
            for word in words.iter().filter(|word| holds(line, word)) {
                complaints.push(format!("{}:{}: holds {word:?}", file.path, number + 1));
            }
        }
    }
    complaints
}

fn holds(line: &str, word: &str) -> bool {
    let inside_a_path = |c: char| c.is_ascii_alphanumeric() || "._-~}/".contains(c);
    line.match_indices(word).any(|(at, _)| !word.starts_with('/') || !line[..at].ends_with(inside_a_path))
}

/// The `code` words of a Markdown text that look like paths of the tree.
fn paths_in(markdown: &str) -> Vec<&str> {
    let mut inside_block = false;
    let mut paths = Vec::new();
    for line in markdown.lines() {
        if line.starts_with("```") {
            inside_block = !inside_block;
        } else if !inside_block {
            paths.extend(line.split('`').skip(1).step_by(2).filter(|word| looks_like_a_path(word)));
        }
    }
    paths
}

fn looks_like_a_path(word: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let roots = [
        "native", "web", "shared", "shaders", "kernels", "tests", "configs", "xtask", "docs", ".ci",
        ".github",
    ];
    word.chars().all(plain)
        && roots.iter().any(|r| word.strip_prefix(r).is_some_and(|rest| rest.starts_with('/')))
}

#[test]
fn no_source_file_is_too_long() {
    none(&too_long(&files()));
    let long = File { path: "a.rs".into(), text: "\n".repeat(MAX_LINES + 1) };
    assert_eq!(too_long(&[long]).len(), 1);
}

// The words below are written in two halves, so that this file passes its own rules.

#[test]
fn nothing_is_left_for_later() {
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X:")];
    none(&holding(&files(), &words));
    let late = File { path: "a.rs".into(), text: format!("fn a() {{}}\n// {}: more", words[0]) };
    assert_eq!(holding(&[late], &words).len(), 1);
}

#[test]
fn no_file_names_a_registry_or_a_folder_of_one_machine() {
    let hosts = [concat!("registry", ".npmjs"), concat!("pypi", ".org"), concat!("index", ".crates.io")];
    let folders =
        [concat!("/ro", "ot/"), concat!("/ho", "me/"), concat!("/Us", "ers/"), concat!("/wo", "rk/")];
    none(&holding(&files(), &hosts));
    none(&holding(&files(), &folders));
    let bound = File { path: "a.md".into(), text: format!("in `{}a`, not in a{0}b", folders[0]) };
    assert_eq!(holding(&[bound], &folders).len(), 1);
    assert!(!holds(&format!("target{}x", folders[3]), folders[3]));
}

#[test]
fn architecture_names_only_what_exists_and_all_of_the_top_level() {
    let text = read("ARCHITECTURE.md");
    let paths = paths_in(&text);
    assert!(paths.len() >= 30, "only {} paths found", paths.len());
    let missing = paths.iter().filter(|p| !root().join(p).exists());
    none(&missing.map(|p| format!("ARCHITECTURE.md names `{p}`, which is not there")).collect::<Vec<_>>());
    for folder in ["native", "web", "shared", "shaders", "kernels", "tests", "configs", "xtask", "docs"] {
        assert!(
            paths.iter().any(|p| p.starts_with(&format!("{folder}/"))),
            "ARCHITECTURE.md says nothing of {folder}/"
        );
    }
    assert_eq!(
        paths_in("see `native/src` and `cargo xtask demo`\n```\n`web/x`\n```\n`tests/y`"),
        ["native/src", "tests/y"]
    );
}

#[test]
fn readme_gives_both_commands_and_links_only_to_what_exists() {
    let readme = read("README.md");
    for command in ["cargo xtask demo", "cargo xtask test"] {
        assert!(readme.lines().any(|line| line.trim() == command), "README.md has no line `{command}`");
    }
    assert!(read(".ci/run").lines().any(|line| line.contains("cargo xtask test")));
    let links: Vec<&str> = readme.split("](").skip(1).filter_map(|rest| rest.split(')').next()).collect();
    assert!(links.len() >= 5, "only {} links found", links.len());
    let local = links.iter().filter(|l| !l.starts_with("http") && !l.starts_with('#'));
    // Pictures are made from a finished demo.
    let local = local.filter(|l| !l.starts_with("docs/images/"));
    none(
        &local
            .filter(|l| !root().join(l).exists())
            .map(|l| format!("README.md links to {l}"))
            .collect::<Vec<_>>(),
    );
}

#[test]
fn every_shader_is_in_the_table_of_shaders() {
    let table = read("shaders/README.md");
    let shaders: Vec<String> = files().into_iter().filter(|f| f.is(&["wgsl"])).map(|f| f.path).collect();
    assert!(!shaders.is_empty(), "no shader found");
    let stray = shaders.iter().filter(|path| {
        let name = path.strip_prefix("shaders/");
        name.is_none_or(|name| name.contains('/') || !table.contains(&format!("`{name}`")))
    });
    none(&stray.map(|path| format!("{path} is not a row of shaders/README.md")).collect::<Vec<_>>());
}
