//! A document as one HTML file that needs nothing else: light and dark, and readable on paper.

use maud::{DOCTYPE, Markup, PreEscaped, html};
use palanquin_lab::chart;

use super::document::{Block, Document, Tone};

const STYLE: &str = "
:root{color-scheme:light dark;--ground:#ffffff;--text:#1f2328;--line:#d0d7de;--good:#dafbe1;--fair:#fff8c5;--bad:#ffd8d3}
@media screen and (prefers-color-scheme:dark){:root{--ground:#0d1117;--text:#e6edf3;--line:#30363d;--good:#0f3d20;--fair:#4a3b0a;--bad:#5c1a16}}
body{background:var(--ground);color:var(--text);font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{font-size:1.3rem;margin-top:2.2rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;margin:1rem 0}
th,td{border:1px solid var(--line);padding:.3rem .6rem;text-align:left;vertical-align:top}
.good{background:var(--good)}.fair{background:var(--fair)}.bad{background:var(--bad)}
pre{border:1px solid var(--line);padding:.6rem;overflow-x:auto}
svg{max-width:40rem;width:100%;height:auto;display:block;margin:1rem 0}
@media print{body{margin:0;max-width:none;font-size:11px}table,svg,pre{break-inside:avoid}.wide{overflow:visible}.good,.fair,.bad{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
";

/// Renders it.
pub(super) fn render(document: &Document) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (document.title) }
                style { (PreEscaped(STYLE)) (PreEscaped(chart::STYLE)) }
            }
            body {
                h1 { (document.title) }
                @for part in &document.blocks { (block(part)) }
            }
        }
    };
    page.into_string()
}

fn block(block: &Block) -> Markup {
    html! {
        @match block {
            Block::Heading(text) => { h2 { (text) } }
            Block::Paragraph(text) => { p { (text) } }
            Block::Code(text) => { pre { code { (text) } } }
            Block::List(points) => { ul { @for point in points { li { (point) } } } }
            Block::Chart(chart) => { (PreEscaped(chart.svg())) }
            Block::Table { head, rows } => {
                div.wide { table {
                    thead { tr { @for text in head { th scope="col" { (text) } } } }
                    tbody { @for row in rows { tr {
                        @for cell in row { td class=[class(cell.tone)] { (cell.text) } }
                    } } }
                } }
            }
        }
    }
}

fn class(tone: Tone) -> Option<&'static str> {
    match tone {
        Tone::Plain => None,
        Tone::Good => Some("good"),
        Tone::Fair => Some("fair"),
        Tone::Bad => Some("bad"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::document::Cell;
    use super::*;

    #[test]
    fn what_a_program_said_is_text_and_never_markup() {
        let mut document = Document::new("<title>");
        document.paragraph("a < b");
        document.table(&["x"], vec![vec![Cell::toned("<script>", Tone::Bad)]]);
        let page = render(&document);
        assert!(!page.contains("<script") && page.contains("&lt;script&gt;"));
        assert!(page.contains("class=\"bad\"") && !page.contains("http://www.w3.org/1999"));
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        let page = render(&Document::new("t"));
        for word in ["src=", "href=", "@import", "url("] {
            assert!(!page.contains(word), "{word}");
        }
    }
}
