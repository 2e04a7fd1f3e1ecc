//! What the program does: the environment variable `PALANQUIN_FUZZ` says it.
//!
//! - `list`: prints the names of the targets;
//! - `seeds:DIR`: writes every target's seeds to `DIR/NAME/`, and its words as a dictionary of libFuzzer to
//!   `DIR/NAME.dict`;
//! - the name of a target: runs it, with libFuzzer's own arguments.

use std::path::Path;
use std::sync::OnceLock;
use std::{fs, io};

use crate::targets;

/// Something that is given hostile bytes. It panics when what it tests breaks a promise.
pub(crate) struct Target {
    /// Its name, and that of its corpus.
    pub(crate) name: &'static str,
    /// Judges one input.
    pub(crate) run: fn(&[u8]),
    /// Inputs to begin with.
    pub(crate) seeds: fn() -> Vec<Vec<u8>>,
    /// Words that inputs are likely to hold.
    pub(crate) words: fn() -> Vec<String>,
}

impl Target {
    /// A target without words of its own.
    pub(crate) const fn new(
        name: &'static str,
        run: fn(&[u8]),
        seeds: fn() -> Vec<Vec<u8>>,
    ) -> Self {
        Self {
            name,
            run,
            seeds,
            words: Vec::new,
        }
    }

    /// The same with words.
    pub(crate) const fn words(self, words: fn() -> Vec<String>) -> Self {
        Self { words, ..self }
    }
}

static RUN: OnceLock<fn(&[u8])> = OnceLock::new();

/// Looks what is asked for, and does it where that is not fuzzing.
pub(crate) fn start() {
    let wish = std::env::var("PALANQUIN_FUZZ").unwrap_or_default();
    if wish == "list" {
        for target in targets::ALL {
            println!("{}", target.name);
        }
        std::process::exit(0);
    }
    if let Some(dir) = wish.strip_prefix("seeds:") {
        if let Err(error) = write_seeds(Path::new(dir)) {
            eprintln!("{dir}: {error}");
            std::process::exit(1);
        }
        std::process::exit(0);
    }
    match targets::ALL.iter().find(|target| target.name == wish) {
        Some(target) => drop(RUN.set(target.run)),
        None => {
            eprintln!("PALANQUIN_FUZZ names no target: {wish:?}");
            std::process::exit(1);
        }
    }
}

/// Gives the chosen target an input.
pub(crate) fn run(data: &[u8]) {
    if let Some(run) = RUN.get() {
        run(data);
    }
}

fn write_seeds(dir: &Path) -> io::Result<()> {
    for target in targets::ALL {
        let own = dir.join(target.name);
        fs::create_dir_all(&own)?;
        for (number, seed) in (target.seeds)().iter().enumerate() {
            fs::write(own.join(format!("seed-{number:03}")), seed)?;
        }
        let words = (target.words)();
        if !words.is_empty() {
            let lines: Vec<_> = words.iter().map(|word| quoted(word)).collect();
            fs::write(dir.join(format!("{}.dict", target.name)), lines.concat())?;
        }
    }
    Ok(())
}

/// A line of a dictionary.
fn quoted(word: &str) -> String {
    let escaped: String = word
        .bytes()
        .map(|byte| match byte {
            b'"' | b'\\' => format!("\\{}", byte as char),
            b' '..=b'~' => (byte as char).to_string(),
            _ => format!("\\x{byte:02X}"),
        })
        .collect();
    format!("\"{escaped}\"\n")
}
