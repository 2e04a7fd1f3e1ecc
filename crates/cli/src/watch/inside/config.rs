//! What is to be watched from inside: options, and a file in TOML.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use palanquin_api::config::{LoadError, is_name};
use palanquin_api::size::HumanDuration;
use palanquin_watch::inside::NEIGHBOURS_MAX;
use serde::Deserialize;

use crate::arguments::InsideArgs;
use crate::failure::Failure;
use crate::files::read_text;

/// Longest file, in bytes.
const CONFIG_MAX: usize = 1 << 20;
/// Time between two looks, if nothing else is said.
const EVERY: Duration = Duration::from_secs(5);
/// The hardware clock tells no more than once a second.
const EVERY_MIN: Duration = Duration::from_secs(1);
const EVERY_MAX: Duration = Duration::from_secs(3600);

/// The whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    every: Option<HumanDuration>,
    #[serde(rename = "neighbour", default)]
    neighbours: Vec<Neighbour>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Neighbour {
    name: String,
    address: IpAddr,
}

/// What both come to.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) every: Duration,
    pub(super) neighbours: Vec<(String, IpAddr)>,
}

impl Watched {
    pub(super) fn new(arguments: &InsideArgs) -> Result<Self, Failure> {
        let mut file = File::default();
        if let Some(path) = &arguments.config {
            file = toml::from_str(&read_text(path, CONFIG_MAX)?).map_err(|error| {
                Failure::usage(format!("{} is not usable", path.display()))
                    .load_error(LoadError::Syntax(error))
                    .hint("keys are `every`, and `name` and `address` of each [[neighbour]]; addresses are of IP")
            })?;
        }
        let every = arguments.every.or(file.every).map(HumanDuration::get);
        let every = every.unwrap_or(EVERY);
        if !(EVERY_MIN..=EVERY_MAX).contains(&every) {
            let what = format!("{every:?} is not between {EVERY_MIN:?} and {EVERY_MAX:?}");
            return Err(Failure::usage(what).hint("this is the time between two looks"));
        }
        let mut neighbours: Vec<(String, IpAddr)> = file
            .neighbours
            .into_iter()
            .map(|of| (of.name, of.address))
            .collect();
        neighbours.extend(arguments.neighbours.iter().cloned());
        if neighbours.len() > NEIGHBOURS_MAX {
            let what = format!("there are at most {NEIGHBOURS_MAX} neighbours");
            return Err(Failure::usage(what));
        }
        let mut names = BTreeSet::new();
        for (name, _) in &neighbours {
            let wrong = |what: &str| Failure::usage(format!("neighbour {name:?}: {what}"));
            if !is_name(name) {
                return Err(wrong(
                    "a name has 1 to 64 of a-z A-Z 0-9 . _ - and begins with a letter or digit",
                ));
            }
            if !names.insert(name) {
                return Err(wrong("another one has this name"));
            }
        }
        Ok(Self { every, neighbours })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_good() {
        let text = include_str!("../../../../../examples/inside.toml");
        let file: File = toml::from_str(text).unwrap();
        assert_eq!(file.neighbours.len(), 2);
        assert_eq!(file.every.map(HumanDuration::get), Some(EVERY));
    }
}
