//! From which value on something is told. Statistics are logarithms of likelihood ratios; they are what
//! `examples/inside_quiet.rs` prints of recordings in which nothing happened, and `docs/watch.md` says of which.
//!
//! A change has a least size besides: what is smaller is real often enough, and no sign of another machine.

/// Statistic of the hardware clock. Largest while nothing happened: 8.6.
pub const RTC: f64 = 20.0;
/// Its least jump, in milliseconds.
pub const RTC_MS: f64 = 4.0;
/// Statistic of the processor's counter. Largest while nothing happened: 1.7.
pub const COUNTER: f64 = 25.0;
/// Its least jump, in milliseconds.
pub const COUNTER_MS: f64 = 0.5;
/// Statistic of a neighbour's clock. Largest while nothing happened: 6.6.
pub const NEIGHBOUR: f64 = 20.0;
/// Its least jump, in milliseconds.
pub const NEIGHBOUR_MS: f64 = 5.0;
/// Neighbours' clocks that jump within so long jump together, in microseconds.
pub const TOGETHER_US: u64 = 60_000_000;
/// Statistic of a ratio of the benchmark. Largest while nothing happened: 77.
pub const BENCHMARK: f64 = 80.0;
/// Its least change, as a factor.
pub const BENCHMARK_TIMES: f64 = 1.5;
/// Statistic of a neighbour's round trips. Largest while nothing happened, on a loopback: 85, but with a smaller change.
pub const DELAY: f64 = 80.0;
/// Their least change, as a factor.
pub const DELAY_TIMES: f64 = 1.5;
/// By how many times a first write takes longer than one right after it, compared with what is usual.
pub const FIRST_WRITE_TIMES: f64 = 2.0;
/// By how much it takes longer at least, in nanoseconds.
pub const FIRST_WRITE_NS: f64 = 50.0;
/// Statistic of the time that an NTP server keeps a question. Largest while nothing happened: 63.
pub const SERVICE: f64 = 80.0;
/// Its least change, as a factor.
pub const SERVICE_TIMES: f64 = 2.0;
