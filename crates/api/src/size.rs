//! Sizes and durations as people write them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Number of bytes, written `1536MiB`, `2GiB`, `512KiB` or as a plain number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(u64);

impl ByteSize {
    /// That many bytes.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// That many MiB; saturates.
    pub const fn mib(mib: u64) -> Self {
        Self(mib.saturating_mul(1 << 20))
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

/// A size that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// No digits, or an unknown unit.
    #[error("`{0}` is not a size: write a number and B, KiB, MiB, GiB or TiB, as in 1536MiB")]
    Syntax(String),
    /// More than 2^64 bytes.
    #[error("`{0}` is more than this machine can count")]
    TooLarge(String),
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let trimmed = text.trim();
        let digits = trimmed
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(digits);
        if number.is_empty() {
            return Err(SizeError::Syntax(text.to_owned()));
        }
        let factor: u64 = match unit.trim() {
            "" | "B" => 1,
            "K" | "KiB" => 1 << 10,
            "M" | "MiB" => 1 << 20,
            "G" | "GiB" => 1 << 30,
            "T" | "TiB" => 1 << 40,
            _ => return Err(SizeError::Syntax(text.to_owned())),
        };
        let number: u64 = number
            .parse()
            .map_err(|_| SizeError::TooLarge(text.to_owned()))?;
        number
            .checked_mul(factor)
            .map(Self)
            .ok_or_else(|| SizeError::TooLarge(text.to_owned()))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, factor) in [
            ("TiB", 1_u64 << 40),
            ("GiB", 1 << 30),
            ("MiB", 1 << 20),
            ("KiB", 1 << 10),
        ] {
            if self.0 >= factor && self.0.is_multiple_of(factor) {
                return write!(f, "{}{unit}", self.0 / factor);
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"1536MiB\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
                u64::try_from(bytes)
                    .map(ByteSize)
                    .map_err(|_| E::custom("a size is not negative"))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

/// A rate, written `1gbit`, `800mbit`, `100MiB/s` or `100MB/s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bandwidth(u64);

impl Bandwidth {
    /// In bytes per second.
    pub const fn bytes_per_s(self) -> u64 {
        self.0
    }
}

/// A rate that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a rate: write a whole number and kbit, mbit, gbit, KiB/s, MiB/s, GiB/s, kB/s, MB/s or GB/s"
)]
pub struct BandwidthError(String);

impl FromStr for Bandwidth {
    type Err = BandwidthError;

    fn from_str(text: &str) -> Result<Self, BandwidthError> {
        let error = || BandwidthError(text.to_owned());
        let trimmed = text.trim();
        let digits = trimmed
            .find(|c: char| !c.is_ascii_digit())
            .ok_or_else(error)?;
        let (number, unit) = trimmed.split_at(digits);
        let number: u64 = number.parse().map_err(|_| error())?;
        let unit = unit.trim();
        // `Mb/s` means bits to some and bytes to others: eight times too fast or too slow is no guess to make.
        if unit.ends_with("b/s") {
            return Err(error());
        }
        let (factor, divisor) = match unit.to_ascii_lowercase().as_str() {
            "kbit" | "kbit/s" => (1_000, 8),
            "mbit" | "mbit/s" => (1_000_000, 8),
            "gbit" | "gbit/s" => (1_000_000_000, 8),
            "kib/s" => (1 << 10, 1),
            "mib/s" => (1 << 20, 1),
            "gib/s" => (1 << 30, 1),
            "kb/s" => (1_000, 1),
            "mb/s" => (1_000_000, 1),
            "gb/s" => (1_000_000_000, 1),
            _ => return Err(error()),
        };
        match number.checked_mul(factor) {
            Some(units) if units >= divisor => Ok(Self(units / divisor)),
            _ => Err(error()),
        }
    }
}

/// Longest duration that is read: a hundred years.
const LONGEST: Duration = Duration::from_secs(100 * 31_557_600);

/// A duration, written `300ms`, `10s` or `10min`; at most a hundred years.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HumanDuration(Duration);

impl HumanDuration {
    /// That many seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// As the standard library's type.
    pub const fn get(self) -> Duration {
        self.0
    }

    /// In milliseconds; saturates.
    pub fn as_millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }
}

impl FromStr for HumanDuration {
    type Err = humantime::DurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let too_much = Err(humantime::DurationError::NumberOverflow);
        // The library panics where the sum of the parts just exceeds what fits: that takes more than this. It takes
        // digits with spaces between them for one number.
        let solid: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        let mut numbers = solid.split(|c: char| !c.is_ascii_digit());
        if solid.len() > 64 || numbers.any(|digits| digits.len() > 12) {
            return too_much;
        }
        match humantime::parse_duration(text) {
            Ok(duration) if duration > LONGEST => too_much,
            other => other.map(Self),
        }
    }
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl Serialize for HumanDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HumanDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_and_rates_are_read_as_people_write_them() {
        assert_eq!("1536MiB".parse::<ByteSize>().unwrap().bytes(), 1536 << 20);
        assert_eq!("2 GiB".parse::<ByteSize>().unwrap().bytes(), 2 << 30);
        assert_eq!(
            "1gbit".parse::<Bandwidth>().unwrap().bytes_per_s(),
            125_000_000
        );
        assert_eq!(
            "100MiB/s".parse::<Bandwidth>().unwrap().bytes_per_s(),
            100 << 20
        );
        assert_eq!("300ms".parse::<HumanDuration>().unwrap().as_millis(), 300);
        for odd in [
            "",
            "MiB",
            "-1MiB",
            "1.5GiB",
            "1XiB",
            "99999999999TiB",
            "0x10",
        ] {
            assert!(odd.parse::<ByteSize>().is_err(), "{odd}");
        }
        for odd in [
            "",
            "100",
            "1tbit",
            "0gbit",
            "99999999999gbit",
            "1.5gbit",
            "-1gbit",
        ] {
            assert!(odd.parse::<Bandwidth>().is_err(), "{odd}");
        }
    }

    #[test]
    fn rates_are_counted_in_the_unit_they_name() {
        for (text, bytes_per_s) in [
            ("8kbit", 1_000),
            ("800mbit", 100_000_000),
            ("800 Mbit/s", 100_000_000),
            ("1gbit", 125_000_000),
            ("1KiB/s", 1 << 10),
            ("1GiB/s", 1 << 30),
            ("1kB/s", 1_000),
            ("100MB/s", 100_000_000),
            ("1GB/s", 1_000_000_000),
        ] {
            let rate = text.parse::<Bandwidth>().unwrap();
            assert_eq!(rate.bytes_per_s(), bytes_per_s, "{text}");
        }
    }

    #[test]
    fn a_rate_that_may_mean_bits_or_bytes_is_refused() {
        for odd in ["100Mb/s", "100mb/s", "1Gb/s", "1kb/s", "1Mib/s"] {
            assert!(odd.parse::<Bandwidth>().is_err(), "{odd}");
        }
    }

    #[test]
    fn a_duration_whose_parts_add_up_to_too_much_is_refused() {
        for text in ["18446744073709551615.1 s0.9 s", "18446744073709551616s"] {
            assert!(text.parse::<HumanDuration>().is_err(), "{text}");
        }
        assert!("100years".parse::<HumanDuration>().is_ok());
        assert!("101years".parse::<HumanDuration>().is_err());
    }

    #[test]
    fn durations_need_a_unit() {
        for (text, ms) in [("300ms", 300), ("10min", 600_000), ("1h 5s", 3_605_000)] {
            assert_eq!(text.parse::<HumanDuration>().unwrap().as_millis(), ms);
        }
        for odd in [
            "",
            "300",
            "ms",
            "-1s",
            "1 fortnight",
            "99999999999999999999s",
        ] {
            assert!(odd.parse::<HumanDuration>().is_err(), "{odd}");
        }
    }

    proptest! {
        #[test]
        fn a_size_is_read_back_as_written(bytes in any::<u64>()) {
            let size = ByteSize::new(bytes);
            prop_assert_eq!(size.to_string().parse::<ByteSize>().unwrap(), size);
        }

        #[test]
        fn a_duration_is_read_back_as_written(ms in 0_u64..1 << 41) {
            let duration = HumanDuration(Duration::from_millis(ms));
            prop_assert_eq!(duration.to_string().parse::<HumanDuration>().unwrap(), duration);
        }

        #[test]
        fn sizes_and_durations_cross_json(bytes in any::<u64>(), seconds in 0_u64..1 << 31) {
            let pair = (ByteSize::new(bytes), HumanDuration::from_secs(seconds));
            let json = serde_json::to_string(&pair).unwrap();
            prop_assert_eq!(serde_json::from_str::<(ByteSize, HumanDuration)>(&json).unwrap(), pair);
        }

        #[test]
        fn arbitrary_text_never_panics(text in "(?s).{0,20}", number in any::<u128>()) {
            for text in [text.clone(), format!("{number}{text}"), format!("{number}gbit")] {
                let _ = text.parse::<ByteSize>();
                let _ = text.parse::<Bandwidth>();
                let _ = text.parse::<HumanDuration>();
            }
        }
    }
}
