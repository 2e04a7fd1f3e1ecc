//! A document as Markdown. Charts are left out: their numbers are in the tables beside them.

use std::fmt::Write as _;

use super::document::{Block, Document};

/// Renders it.
pub(super) fn render(document: &Document) -> String {
    let mut out = format!("# {}\n", document.title);
    for block in &document.blocks {
        // Writing to a string cannot fail.
        let _ = match block {
            Block::Heading(text) => write!(out, "\n## {text}\n"),
            Block::Paragraph(text) => write!(out, "\n{text}\n"),
            Block::Code(text) => write!(out, "\n```\n{text}\n```\n"),
            Block::List(points) => {
                let points: String = points.iter().map(|point| format!("- {point}\n")).collect();
                write!(out, "\n{points}")
            }
            Block::Table { head, rows } => {
                let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
                let head_line = line(head.iter().map(|text| escape(text)).collect());
                let rows: String = rows
                    .iter()
                    .map(|row| line(row.iter().map(|cell| escape(&cell.text)).collect()))
                    .collect();
                write!(out, "\n{head_line}|{}\n{rows}", "---|".repeat(head.len()))
            }
            Block::Chart(_) => Ok(()),
        };
    }
    out
}

fn escape(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::super::document::Cell;
    use super::*;

    #[test]
    fn a_bar_or_a_new_line_within_a_cell_does_not_break_a_table() {
        let mut document = Document::new("t");
        document.table(
            &["a", "b"],
            vec![vec![Cell::plain("x|y"), Cell::plain("1\n2")]],
        );
        assert_eq!(
            render(&document),
            "# t\n\n| a | b |\n|---|---|\n| x\\|y | 1 2 |\n"
        );
    }
}
