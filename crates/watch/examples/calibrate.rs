//! Writes `src/calibration/table.rs` from synthetic traces: `cargo run -p palanquin-watch --example calibrate`.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Instant;

use palanquin_watch::Calibration;
use palanquin_watch::calibrate::{Effort, calibrate};

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1).map_while(|text| text.parse().ok());
    let effort = Effort {
        vm_days: arguments.next().unwrap_or(60),
        trials: arguments.next().unwrap_or(200),
        seed: 2026,
    };
    let began = Instant::now();
    let made = calibrate(&effort, |what| {
        eprintln!("{:4} s {what}", began.elapsed().as_secs());
    });
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/calibration/table.rs");
    fs::write(&path, source(&made, &effort))?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

fn source(made: &Calibration, effort: &Effort) -> String {
    let mut text = format!(
        "//! Written by `cargo run -p palanquin-watch --example calibrate` from synthetic traces: {} quiet VM-days for each step, and\n\
         //! {} trials of each class for each step, from seed {}.\n\n\
         use super::{{Calibration, Thresholds}};\n\n\
         #[rustfmt::skip]\n\
         pub(super) const BUILT_IN: Calibration = Calibration {{\n",
        effort.vm_days, effort.trials, effort.seed
    );
    for (name, of) in [
        ("rise", made.rise),
        ("silence", made.silence),
        ("clock", made.clock),
    ] {
        let _ = writeln!(text, "    {name}: {of:?},");
    }
    for (name, table) in [("early", &made.early), ("full", &made.full)] {
        let _ = writeln!(text, "    {name}: [");
        for class in table {
            let _ = writeln!(text, "        [");
            for channel in class {
                let _ = writeln!(text, "            {channel:?},");
            }
            let _ = writeln!(text, "        ],");
        }
        let _ = writeln!(text, "    ],");
    }
    for (name, curve) in [
        ("early_curve", made.early_curve),
        ("full_curve", made.full_curve),
    ] {
        let _ = writeln!(text, "    {name}: {curve:?},");
    }
    let _ = writeln!(text, "    alarm_score: {:?},", made.alarm_score);
    let _ = writeln!(text, "    quiet_vm_days: {:?},\n}};", made.quiet_vm_days);
    text
}
