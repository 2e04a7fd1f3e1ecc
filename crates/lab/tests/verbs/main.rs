//! Every cell of the matrix of refusals (`docs/refusals.md`), tried on real agents.
#![forbid(unsafe_code)]

mod control;
#[path = "../shared/forger.rs"]
mod forger;
mod hosts;

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use palanquin_agent::verbs::Cell;

/// What came of a try.
#[derive(Debug)]
enum Came {
    /// An answer.
    Answer,
    /// A refusal, with these codes.
    Codes(BTreeSet<String>),
}

impl Came {
    fn code(code: &str) -> Self {
        Self::Codes([code.to_owned()].into())
    }

    /// Whether it is what the cell says.
    fn fits(&self, cell: Cell) -> bool {
        match (self, cell) {
            (Self::Answer, Cell::Answered(_)) => true,
            (Self::Codes(codes), Cell::Refused(code)) => codes.contains(code),
            _ => false,
        }
    }
}

/// What did not come out as the matrix says, all at once.
#[derive(Default)]
struct Wrong {
    tried: usize,
    cells: Vec<String>,
}

impl Wrong {
    fn look(&mut self, cell: Cell, name: &str, came: Result<Came>) {
        self.tried += 1;
        match came {
            Ok(came) if came.fits(cell) => {}
            other => self
                .cells
                .push(format!("{name}: {other:?}, and the matrix says {cell:?}")),
        }
    }

    fn end(self, tried_min: usize) -> Result<()> {
        ensure!(self.cells.is_empty(), "{:#?}", self.cells);
        ensure!(self.tried >= tried_min, "only {} cells", self.tried);
        Ok(())
    }
}
