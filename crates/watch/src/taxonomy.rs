//! The taxonomy of how a migration can be noticed: from inside the guest or from outside, each by four methods. Each of the
//! eight cells has a detector here; `tests/taxonomy.rs` shows of each that it fires where it must and is quiet where it must.

use serde::{Deserialize, Serialize};

/// Where it is watched from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// From inside the guest that may be moved.
    Internal,
    /// From another machine.
    External,
}

/// How.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// What names processor, firmware and hypervisor.
    HypervisorFingerprint,
    /// How fast it computes.
    HardwareBenchmark,
    /// Its clocks: what stood still lags.
    TimeLag,
    /// How far others are.
    Delay,
}

/// One cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Cell {
    /// Where.
    pub place: Place,
    /// How.
    pub method: Method,
}

impl Cell {
    /// All eight.
    pub const ALL: [Self; 8] = [
        Self::new(Place::Internal, Method::HypervisorFingerprint),
        Self::new(Place::Internal, Method::HardwareBenchmark),
        Self::new(Place::Internal, Method::TimeLag),
        Self::new(Place::Internal, Method::Delay),
        Self::new(Place::External, Method::HypervisorFingerprint),
        Self::new(Place::External, Method::HardwareBenchmark),
        Self::new(Place::External, Method::TimeLag),
        Self::new(Place::External, Method::Delay),
    ];

    /// The cell of that place and method.
    #[must_use]
    pub const fn new(place: Place, method: Method) -> Self {
        Self { place, method }
    }

    /// What finds it here.
    #[must_use]
    pub fn detector(self) -> &'static str {
        match (self.place, self.method) {
            (Place::Internal, Method::HypervisorFingerprint) => {
                "inside::Inside, Sample::fingerprint"
            }
            (Place::Internal, Method::HardwareBenchmark) => "inside::Inside, Sample::speeds",
            (Place::Internal, Method::TimeLag) => "inside::Inside, Sample::clocks",
            (Place::Internal, Method::Delay) => "inside::Inside, Sample::neighbours",
            (Place::External, Method::HypervisorFingerprint) => "outside::Looks",
            (Place::External, Method::HardwareBenchmark) => "outside::Service",
            (Place::External, Method::TimeLag) => "Watcher, Channel::Clock",
            (Place::External, Method::Delay) => "Watcher, Channel::Rise",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_eight_cells_and_each_has_a_detector_of_its_own() {
        let mut detectors: Vec<_> = Cell::ALL.map(Cell::detector).into();
        detectors.sort_unstable();
        detectors.dedup();
        assert_eq!(detectors.len(), 8);
    }
}
