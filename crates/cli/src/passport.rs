//! `palanquin passport`: what the owner of a VM does, offline.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use palanquin_api::control::ErrorKind;
use palanquin_trust::keys::Ed25519Signer;
use palanquin_trust::passport::{Passport, SpecError};
use palanquin_trust::signed::{ENVELOPE_MAX, VerifyError};
use palanquin_trust::{Identity, Keyring, Kind, PublicKey, Sign, Signed, Verified};
use serde_json::{Value, json};
use uuid::Uuid;
use x509_parser::pem::Pem;

use crate::arguments::PassportCommand;
use crate::commands::show;
use crate::failure::Failure;
use crate::files::{NewFiles, failed, make_dir, read, read_text};
use crate::output::{line, lines};

/// Longest specification or key that is read.
const TEXT_MAX: usize = 256 * 1024;

/// Does what was typed.
pub(crate) fn run(command: &PassportCommand, json: bool) -> Result<(), Failure> {
    match command {
        PassportCommand::Keygen { owner, out } => keygen(owner, out, json),
        PassportCommand::Sign {
            spec,
            key,
            out,
            replaces,
        } => sign(spec, key, out, replaces.as_deref(), json),
        PassportCommand::Show { file } => peek(file, json),
        PassportCommand::Verify {
            file,
            owner,
            key,
            vm,
            known,
        } => {
            let trusted = trusted(owner, key)?;
            let passport = verified(file, &trusted, *vm)?;
            if let Some(known) = known {
                follows(&passport, file, &open(known, &trusted)?)?;
            }
            let value = told(&passport);
            let text = |_: &Value| {
                let (file, owner, version) = (file.display(), &passport.owner, passport.version);
                let until = palanquin_trust::passport::date(passport.expires_unix_s);
                format!(
                    "{file} is version {version} of {owner}'s passport for VM {}, good until {until}.\n",
                    passport.vm
                )
            };
            show(&value, text, json)
        }
    }
}

/// What a passport that was verified is told as.
fn told(passport: &Verified<Passport>) -> Value {
    json!({ "verified": true, "sha256": passport.sha256(), "passport": **passport })
}

fn keygen(owner: &Identity, out: &Path, json: bool) -> Result<(), Failure> {
    check_owner(owner)?;
    let no_key = |_| failed("cannot make a key", "the library refuses");
    let key = Ed25519KeyPair::generate().map_err(no_key)?;
    // The first version of the form: the second is not read by OpenSSL 3.0.
    let private_der = key.to_pkcs8v1().map_err(no_key)?;
    let public_der: PublicKeyX509Der<'_> = key.public_key().as_der().map_err(no_key)?;
    let written = |label: &str, der: &[u8]| {
        let unix = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
        pem::encode_config(&pem::Pem::new(label, der), unix)
    };
    make_dir(out)?;
    let path = |ending: &str| out.join(format!("{}.{ending}", owner.name()));
    let (secret, public) = (path("key"), path("pub"));
    let mut files = NewFiles::default();
    let private_pem = written("PRIVATE KEY", private_der.as_ref());
    files.write(&secret, private_pem, 0o600)?;
    files.write(&public, written("PUBLIC KEY", public_der.as_ref()), 0o644)?;
    let id = public_key(&public)?.id();
    files.keep();
    let made = json!({
        "owner": owner,
        "key": secret.display().to_string(),
        "public_key": public.display().to_string(),
        "key_id": id,
    });
    let text = |_: &Value| {
        let (secret, public) = (secret.display(), public.display());
        format!(
            "Wrote {secret} (keep it to yourself) and {public} (give it to hosts).\nIts name is {id}.\n"
        )
    };
    show(&made, text, json)
}

fn sign(
    spec: &Path,
    key: &Path,
    out: &Path,
    replaces: Option<&Path>,
    json: bool,
) -> Result<(), Failure> {
    let passport = Passport::from_toml(&read_text(spec, TEXT_MAX)?).map_err(|error| {
        let failure = Failure::usage(format!("{} is no usable passport", spec.display()));
        match error {
            SpecError::Syntax(error) => failure.cause(error),
            error => failure.cause(error).hint("docs/policy.md has an example"),
        }
    })?;
    let signer = private_key(key)?;
    let signed = Signed::sign(&passport, &signer)
        .map_err(|error| failed("cannot sign the passport", error))?;
    let mut trusted = Keyring::default();
    trusted
        .insert(passport.owner.clone(), signer.public_key())
        .map_err(|error| failed("cannot use the key", error))?;
    // What is handed out is what others will verify.
    let passport = signed
        .verify_lapsed(&trusted)
        .map_err(|error| failed("the passport that was signed does not verify", error))?;
    if let Some(old) = replaces {
        let known = open(old, &trusted)?;
        follows(&passport, spec, &known)?;
        if passport.version == known.version {
            let what = format!("{} has version {} already", old.display(), known.version);
            return Err(Failure::usage(what).hint("raise `version`: hosts refuse a second one"));
        }
    }
    let mut files = NewFiles::default();
    files.write(out, signed.as_bytes(), 0o644)?;
    files.keep();
    let value = told(&passport);
    let text = |_: &Value| {
        let (version, vm, out) = (passport.version, passport.vm, out.display());
        format!("Wrote version {version} of the passport of VM {vm} to {out}.\n")
    };
    show(&value, text, json)
}

fn peek(file: &Path, json: bool) -> Result<(), Failure> {
    let signed = envelope(file)?;
    let contents = signed.peek().map_err(|error| {
        Failure::usage(format!("{} is no passport", file.display())).cause(error)
    })?;
    let value = json!({
        "verified": false,
        "sha256": signed.sha256(),
        "key_id": signed.key_id(),
        "passport": contents,
    });
    let text = |_: &Value| {
        let shown: Vec<_> = contents.to_string().lines().map(line).collect();
        let (shown, key) = (shown.join("\n"), signed.key_id());
        format!(
            "{shown}\nsigned by    {key}\n\nNobody has checked the signature: `palanquin passport verify` does.\n"
        )
    };
    show(&value, text, json)
}

/// Reads and verifies a signed passport, as of now.
pub(crate) fn verified(
    file: &Path,
    trusted: &Keyring,
    vm: Option<Uuid>,
) -> Result<Verified<Passport>, Failure> {
    let signed = envelope(file)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_err(|error| failed("the clock is before 1970", error))?;
    let passport = signed
        .verify(trusted, now.as_secs())
        .map_err(|error| refused(file, &error))?;
    match vm {
        Some(vm) if vm != passport.vm => {
            let what = format!("{} is refused", file.display());
            Err(Failure::new(ErrorKind::Refused, what)
                .cause(format!("it is the passport of VM {}", passport.vm)))
        }
        _ => Ok(passport),
    }
}

/// Reads a signed passport that may have expired.
fn open(file: &Path, trusted: &Keyring) -> Result<Verified<Passport>, Failure> {
    let verified = envelope(file)?.verify_lapsed(trusted);
    verified.map_err(|error| refused(file, &error))
}

fn refused(file: &Path, error: &VerifyError) -> Failure {
    let what = format!("{} is refused ({})", file.display(), error.code());
    let failure = Failure::new(ErrorKind::Refused, what).cause(error);
    match error {
        VerifyError::UnknownKey(_) => failure
            .hint("is this the public key of its owner? `palanquin passport show` names the key"),
        VerifyError::Window(_) => failure.hint("ask the owner for one that holds now"),
        VerifyError::Signature => failure.hint("get it from the owner again"),
        _ => failure,
    }
}

fn follows(
    passport: &Verified<Passport>,
    file: &Path,
    known: &Verified<Passport>,
) -> Result<(), Failure> {
    passport.follows(&known.to_last()).map_err(|error| {
        let what = format!("{} is refused (passport-not-newest)", file.display());
        Failure::new(ErrorKind::Refused, what)
            .cause(error)
            .hint("a VM's passports have one owner, and versions that grow")
    })
}

fn envelope(file: &Path) -> Result<Signed<Passport>, Failure> {
    // One more than may be: the envelope says itself that it is too long.
    Signed::from_bytes(&read(file, ENVELOPE_MAX)?).map_err(|error| {
        Failure::usage(format!("{} is no signed passport", file.display()))
            .cause(error)
            .hint("`palanquin passport sign` makes one")
    })
}

/// Believes that this key is that owner's.
pub(crate) fn trusted(owner: &Identity, key: &Path) -> Result<Keyring, Failure> {
    check_owner(owner)?;
    let mut ring = Keyring::default();
    ring.insert(owner.clone(), public_key(key)?)
        .map_err(|error| failed("cannot use the key", error))?;
    Ok(ring)
}

fn check_owner(owner: &Identity) -> Result<(), Failure> {
    if owner.kind() == Kind::Owner {
        return Ok(());
    }
    Err(Failure::usage(format!("{owner} is no owner"))
        .hint("the form is spiffe://TRUST-DOMAIN/owner/NAME"))
}

/// The one block of a PEM file, which must have this label.
fn block(path: &Path, label: &str) -> Result<Vec<u8>, Failure> {
    let text = read(path, TEXT_MAX)?;
    let unusable = || {
        let what = format!("{} is no key that is of use here", path.display());
        Failure::usage(what).hint("`palanquin passport keygen` makes NAME.key and NAME.pub")
    };
    let mut blocks = Pem::iter_from_buffer(&text);
    match (blocks.next(), blocks.next()) {
        (Some(Ok(pem)), None) if pem.label == label => Ok(pem.contents),
        (Some(Ok(pem)), None) => {
            let found = lines(&pem.label, "");
            Err(unusable().cause(format!("it holds a {found}, not a {label}")))
        }
        (Some(Err(error)), _) => Err(unusable().cause(error)),
        (None, _) => Err(unusable().cause("there is no PEM block in it")),
        (Some(Ok(_)), Some(_)) => Err(unusable().cause("there are several PEM blocks in it")),
    }
}

fn public_key(path: &Path) -> Result<PublicKey, Failure> {
    PublicKey::from_spki_der(&block(path, "PUBLIC KEY")?).map_err(|error| {
        Failure::usage(format!("{} is no key that is of use here", path.display())).cause(error)
    })
}

/// The private key in a PEM file that is open to nobody else.
pub(crate) fn private_block(path: &Path) -> Result<Vec<u8>, Failure> {
    let key = block(path, "PRIVATE KEY")?;
    let mode = fs::metadata(path).map_or(0, |meta| meta.permissions().mode());
    if mode & 0o077 != 0 {
        let what = format!("{} is open to others than its owner", path.display());
        return Err(Failure::usage(what).hint(format!("chmod 600 {}", path.display())));
    }
    Ok(key)
}

fn private_key(path: &Path) -> Result<Ed25519Signer, Failure> {
    let key = private_block(path)?;
    Ed25519Signer::from_pkcs8(&key).map_err(|error| {
        Failure::usage(format!("{} is no key that is of use here", path.display())).cause(error)
    })
}
