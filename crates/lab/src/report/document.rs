//! What a report says, apart from how it looks.

use palanquin_lab::chart::Chart;

/// How a cell is to be read at a glance. The words say it as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    Plain,
    Good,
    Fair,
    Bad,
}

/// A cell of a table.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    pub(super) text: String,
    pub(super) tone: Tone,
}

impl Cell {
    pub(super) fn plain(text: impl Into<String>) -> Self {
        Self::toned(text, Tone::Plain)
    }

    pub(super) fn toned(text: impl Into<String>, tone: Tone) -> Self {
        Self {
            text: text.into(),
            tone,
        }
    }
}

/// A part of a document.
#[derive(Clone, Debug)]
pub(super) enum Block {
    Heading(String),
    Paragraph(String),
    /// A line of the terminal.
    Code(String),
    List(Vec<String>),
    Table {
        head: Vec<String>,
        rows: Vec<Vec<Cell>>,
    },
    Chart(Chart),
}

/// All of it.
#[derive(Clone, Debug)]
pub(super) struct Document {
    pub(super) title: String,
    pub(super) blocks: Vec<Block>,
}

impl Document {
    pub(super) fn new(title: &str) -> Self {
        Self {
            title: title.to_owned(),
            blocks: Vec::new(),
        }
    }

    pub(super) fn heading(&mut self, text: &str) {
        self.blocks.push(Block::Heading(text.to_owned()));
    }

    pub(super) fn paragraph(&mut self, text: &str) {
        self.blocks.push(Block::Paragraph(text.to_owned()));
    }

    pub(super) fn table(&mut self, head: &[&str], rows: Vec<Vec<Cell>>) {
        self.blocks.push(Block::Table {
            head: head.iter().map(|&text| text.to_owned()).collect(),
            rows,
        });
    }
}
