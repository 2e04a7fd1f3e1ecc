//! A text file that is open, as in an editor, for an eavesdropper to find on the wire.

use std::fs::File;
use std::io::Read as _;

use crate::canary::Canary;

/// Longest text.
const LONGEST: u64 = 64 << 10;

/// The file, and its text in memory.
pub(crate) struct Document {
    _file: File,
    text: Canary,
}

impl Document {
    /// Opens and reads it.
    pub(crate) fn open(path: &str) -> Result<Self, String> {
        let refused = |why: String| format!("palanquin.open: {path}: {why}");
        let mut file = File::open(path).map_err(|why| refused(why.to_string()))?;
        let mut text = String::new();
        (&mut file)
            .take(LONGEST)
            .read_to_string(&mut text)
            .map_err(|why| refused(why.to_string()))?;
        let text = text.trim_end();
        if text.is_empty() {
            return Err(refused("there is no text in it".to_owned()));
        }
        Ok(Self {
            text: Canary::new(text),
            _file: file,
        })
    }

    /// Whether the text is still what it was.
    pub(crate) fn verify(&self) -> bool {
        self.text.verify()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_a_text_is_opened_and_one_without_is_refused() {
        let path = std::env::temp_dir().join(format!("document-{}", std::process::id()));
        let shown = path.display().to_string();
        std::fs::write(&path, "The heron\n").unwrap();
        let opened = Document::open(&shown);
        std::fs::write(&path, "\n").unwrap();
        let empty = Document::open(&shown);
        std::fs::remove_file(&path).unwrap();
        let gone = Document::open(&shown);
        assert!(opened.is_ok_and(|document| document.verify()));
        assert!(empty.err().unwrap().ends_with("there is no text in it"));
        assert!(gone.is_err());
    }
}
