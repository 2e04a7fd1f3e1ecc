//! A provider's policies and people's public keys, read from files within bounds: the same for the agent that judges by
//! them and for the command line that checks them.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use palanquin_trust::keys::KeyError;
use palanquin_trust::policy::{FILE_MAX, FILES_MAX, Files, LoadError, Policies};
use palanquin_trust::{Identity, Keyring, PublicKey};
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Longest `directory.toml`, in bytes.
pub const DIRECTORY_MAX: usize = 16 * FILE_MAX;
/// Longest file with a key, in bytes.
pub const KEY_FILE_MAX: usize = 64 * 1024;

/// Why something can't be had from files.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// Not there, or not readable.
    #[error("cannot read {path}: {error}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// Longer than may be.
    #[error("{path} has more than {most} bytes")]
    TooLong {
        /// Which.
        path: PathBuf,
        /// How many there may be.
        most: usize,
    },
    /// A text that is none.
    #[error("{0} is not UTF-8")]
    NotUtf8(PathBuf),
    /// More files than may be.
    #[error("more than {most} *{ending} in {dir}")]
    TooMany {
        /// Where.
        dir: PathBuf,
        /// What their names end with.
        ending: &'static str,
        /// How many there may be.
        most: usize,
    },
    /// A directory without any policy permits nothing: most likely it is another than meant.
    #[error("there are no policies in {0}")]
    NoPolicies(PathBuf),
    /// Policies that can't be used.
    #[error("the policies in {0} can't be used: {1}")]
    Policies(PathBuf, #[source] LoadError),
    /// No key of use.
    #[error("{path} is no public key that is of use here: {why}")]
    Key {
        /// Which file.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// Keys that can't be believed together.
    #[error(transparent)]
    Ring(#[from] KeyError),
}

/// Reads a file of at most that many bytes.
///
/// # Errors
///
/// It can't be read, or is longer.
pub fn read(path: &Path, most: usize) -> Result<Vec<u8>, FilesError> {
    let unreadable = |error| FilesError::Read {
        path: path.to_owned(),
        error,
    };
    let file = File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(most as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() > most {
        let path = path.to_owned();
        return Err(FilesError::TooLong { path, most });
    }
    Ok(bytes)
}

/// Reads a text of at most that many bytes.
///
/// # Errors
///
/// It can't be read, is longer, or is none.
pub fn read_text(path: &Path, most: usize) -> Result<String, FilesError> {
    String::from_utf8(read(path, most)?).map_err(|_| FilesError::NotUtf8(path.to_owned()))
}

/// Texts of the files of a directory with this ending, by their names without it; each of at most
/// [`FILE_MAX`] bytes.
///
/// # Errors
///
/// There are more, or one can't be read.
pub fn texts(
    dir: &Path,
    ending: &'static str,
    most: usize,
) -> Result<BTreeMap<String, String>, FilesError> {
    let unreadable = |error| FilesError::Read {
        path: dir.to_owned(),
        error,
    };
    let mut texts = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(stem) = name.and_then(|name| name.strip_suffix(ending)) else {
            continue;
        };
        if texts.len() == most {
            let dir = dir.to_owned();
            return Err(FilesError::TooMany { dir, ending, most });
        }
        texts.insert(stem.to_owned(), read_text(&path, FILE_MAX)?);
    }
    Ok(texts)
}

/// The policies of a directory with `*.cedar` and `directory.toml`.
///
/// # Errors
///
/// A file can't be read, or everything that is wrong with them.
pub fn policies(dir: &Path) -> Result<Policies, FilesError> {
    let policies = texts(dir, ".cedar", FILES_MAX)?;
    if policies.is_empty() {
        return Err(FilesError::NoPolicies(dir.to_owned()));
    }
    let files = Files {
        policies: policies
            .into_iter()
            .map(|(name, text)| (name + ".cedar", text))
            .collect(),
        directory: read_text(&dir.join("directory.toml"), DIRECTORY_MAX)?,
    };
    Policies::load(&files).map_err(|error| FilesError::Policies(dir.to_owned(), error))
}

/// The public key in a PEM file: a `PUBLIC KEY`, or that of a `CERTIFICATE` with this name. Whoever lists the file
/// believes it: neither who issued the certificate nor its time is asked for.
///
/// # Errors
///
/// The file can't be read, or has no such key.
pub fn public_key(path: &Path, whose: &Identity) -> Result<PublicKey, FilesError> {
    let text = read(path, KEY_FILE_MAX)?;
    let odd = |why: String| FilesError::Key {
        path: path.to_owned(),
        why,
    };
    let mut blocks = Pem::iter_from_buffer(&text);
    let pem = match (blocks.next(), blocks.next()) {
        (Some(Ok(pem)), None) => pem,
        (Some(Err(error)), _) => return Err(odd(error.to_string())),
        (None, _) => return Err(odd("there is no PEM block in it".to_owned())),
        (Some(Ok(_)), Some(_)) => {
            return Err(odd("there are several PEM blocks in it".to_owned()));
        }
    };
    let key = |der: &[u8]| PublicKey::from_spki_der(der).map_err(|error| odd(error.to_string()));
    match pem.label.as_str() {
        "PUBLIC KEY" => key(&pem.contents),
        "CERTIFICATE" => {
            let (_, certificate) = X509Certificate::from_der(&pem.contents)
                .map_err(|error| odd(format!("the certificate cannot be read: {error}")))?;
            let expected = whose.to_string();
            let extension = certificate.subject_alternative_name().ok().flatten();
            let mut names = extension
                .iter()
                .flat_map(|extension| &extension.value.general_names);
            if !names.any(|name| matches!(name, GeneralName::URI(uri) if *uri == expected)) {
                return Err(odd(format!("the certificate does not name {expected}")));
            }
            key(certificate.public_key().raw)
        }
        label => {
            let label: String = label.chars().take(40).collect();
            Err(odd(format!(
                "it holds a {label:?}, not a PUBLIC KEY or CERTIFICATE"
            )))
        }
    }
}

/// Believes these keys.
///
/// # Errors
///
/// A file has no key, or one key would have two owners.
pub fn keyring<'a>(
    entries: impl IntoIterator<Item = (&'a Identity, &'a Path)>,
) -> Result<Keyring, FilesError> {
    let mut ring = Keyring::default();
    for (identity, path) in entries {
        ring.insert(identity.clone(), public_key(path, identity)?)?;
    }
    Ok(ring)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acme() -> Identity {
        "spiffe://example.org/owner/acme".parse().unwrap()
    }

    #[test]
    fn the_example_is_read_and_an_empty_directory_is_not_taken_for_policies() {
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/policy");
        assert!(policies(&example).unwrap().names().len() > 5);
        let empty = tempfile::tempdir().unwrap();
        let error = policies(empty.path()).unwrap_err();
        assert!(matches!(error, FilesError::NoPolicies(_)), "{error}");
        fs::write(empty.path().join("a.cedar"), "permit (nonsense").unwrap();
        fs::write(empty.path().join("directory.toml"), "version = 1\n").unwrap();
        let error = policies(empty.path()).unwrap_err();
        assert!(matches!(error, FilesError::Policies(..)), "{error}");
    }

    #[test]
    fn what_is_too_long_or_no_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pub");
        let absent = public_key(&path, &acme()).unwrap_err();
        assert!(matches!(absent, FilesError::Read { .. }), "{absent}");
        fs::write(&path, vec![b'-'; KEY_FILE_MAX + 1]).unwrap();
        let long = public_key(&path, &acme()).unwrap_err();
        assert!(matches!(long, FilesError::TooLong { .. }), "{long}");
        for odd in [
            "",
            "nonsense",
            "-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n",
            "-----BEGIN PUBLIC KEY-----\nMAA=\n-----END PUBLIC KEY-----\n",
            "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n",
        ] {
            fs::write(&path, odd).unwrap();
            let error = public_key(&path, &acme()).unwrap_err();
            assert!(matches!(error, FilesError::Key { .. }), "{odd}: {error}");
        }
    }
}
