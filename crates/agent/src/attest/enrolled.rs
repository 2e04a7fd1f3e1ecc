//! The hosts whose TPMs are known: a directory of files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use palanquin_trust::enrolment::{Enrolled, TEXT_MAX};
use palanquin_trust::evidence::registers::RegisterPolicy;
use palanquin_trust::{Identity, PublicKey};

/// Most hosts.
const HOSTS_MAX: usize = 10_000;

/// A file or directory that is not usable.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct EnrolledError {
    /// Which.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: String,
}

/// A host whose TPM is known.
#[derive(Debug)]
pub struct EnrolledHost {
    /// The key that signs its quotes.
    pub key: PublicKey,
    /// What its registers may hold.
    pub policy: RegisterPolicy,
    resets: AtomicU32,
}

/// All of them.
#[derive(Debug, Default)]
pub struct EnrolledHosts(BTreeMap<Identity, EnrolledHost>);

impl EnrolledHost {
    /// Resets that its TPM had counted when it was last seen.
    pub fn reset_count(&self) -> u32 {
        self.resets.load(Ordering::Relaxed)
    }

    /// It was seen with so many.
    pub fn saw_resets(&self, count: u32) {
        self.resets.fetch_max(count, Ordering::Relaxed);
    }
}

impl EnrolledHosts {
    /// Reads every `*.toml` of a directory.
    ///
    /// # Errors
    ///
    /// One of them is not usable, a host is there twice, or two hosts have the same key.
    pub fn read(dir: &Path) -> Result<Self, EnrolledError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |problem: String| EnrolledError { path, problem }
        };
        let mut hosts = BTreeMap::new();
        let entries = fs::read_dir(dir).map_err(|error| failed(dir)(error.to_string()))?;
        for entry in entries {
            let path = entry
                .map_err(|error| failed(dir)(error.to_string()))?
                .path();
            if path.extension().is_none_or(|extension| extension != "toml") {
                continue;
            }
            let failed = failed(&path);
            let size = fs::metadata(&path).map_or(0, |meta| meta.len());
            if size > TEXT_MAX as u64 {
                return Err(failed(format!(
                    "{size} bytes, at most {TEXT_MAX} are allowed"
                )));
            }
            let host = fs::read_to_string(&path)
                .map_err(|error| error.to_string())
                .and_then(|text| Enrolled::from_toml(&text).map_err(|error| error.to_string()))
                .and_then(|file| {
                    let key = file.key().map_err(|error| error.to_string())?;
                    let policy = file.policy().map_err(|error| error.to_string())?;
                    let resets = AtomicU32::new(file.reset_count);
                    let host = EnrolledHost {
                        key,
                        policy,
                        resets,
                    };
                    Ok((file.host, host))
                });
            let (name, host) = match host {
                Ok(host) => host,
                Err(problem) => return Err(failed(problem)),
            };
            // One TPM that speaks for two hosts could be relayed.
            let other = hosts
                .iter()
                .find(|(_, known): &(_, &EnrolledHost)| known.key == host.key);
            if let Some((other, _)) = other {
                return Err(failed(format!("{name} has the same key as {other}")));
            }
            if hosts.len() >= HOSTS_MAX {
                return Err(failed(format!("more than {HOSTS_MAX} hosts")));
            }
            if hosts.contains_key(&name) {
                return Err(failed(format!("{name} is enrolled twice")));
            }
            hosts.insert(name, host);
        }
        Ok(Self(hosts))
    }

    /// What is known of a host.
    pub fn get(&self, host: &Identity) -> Option<&EnrolledHost> {
        self.0.get(host)
    }

    /// Resets that each has counted.
    pub fn resets(&self) -> Vec<(Identity, u32)> {
        let count = |(host, known): (&Identity, &EnrolledHost)| (host.clone(), known.reset_count());
        self.0.iter().map(count).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "3059301306072a8648ce3d020106082a8648ce3d0301070342000465eda5a12577c2bae829437fe338701a10aaa375e1bb5b5de108de439c08551d1e52ed75701163f7f9e40ddf9f341b3dc9ba860af7e0ca7ca7e9eecd0084d19c";

    fn file(name: &str) -> String {
        let digest = palanquin_trust::Sha256([1; 32]);
        format!(
            "host = \"spiffe://example.org/host/{name}\"\nattestation-key = \"{KEY}\"\nendorsement-key = \"{digest}\"\n\
             reset-count = 5\nenrolled-unix-s = 1\n[[register]]\nnumber = 7\nallowed = [\"{digest}\"]\n"
        )
    }

    #[test]
    fn enrolments_are_read_from_a_directory_and_resets_never_count_back() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("beta.toml"), file("beta")).unwrap();
        fs::write(dir.path().join("README"), "not one").unwrap();
        let hosts = EnrolledHosts::read(dir.path()).unwrap();
        let beta: Identity = "spiffe://example.org/host/beta".parse().unwrap();
        let host = hosts.get(&beta).unwrap();
        assert_eq!((host.reset_count(), host.policy.pcrs()), (5, 0x80));
        host.saw_resets(7);
        host.saw_resets(6);
        assert_eq!(hosts.resets(), [(beta, 7)]);
    }

    #[test]
    fn one_key_for_two_hosts_and_files_that_are_none_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let problem = || EnrolledHosts::read(dir.path()).unwrap_err().problem;
        fs::write(dir.path().join("a.toml"), file("a")).unwrap();
        fs::write(dir.path().join("b.toml"), file("b")).unwrap();
        assert!(problem().contains("the same key"), "{}", problem());
        fs::write(dir.path().join("b.toml"), file("b").replace("3059", "3058")).unwrap();
        assert!(problem().contains("key"), "{}", problem());
        fs::write(dir.path().join("b.toml"), "x".repeat(TEXT_MAX + 1)).unwrap();
        assert!(problem().contains("bytes"), "{}", problem());
        assert!(EnrolledHosts::read(&dir.path().join("none")).is_err());
    }
}
