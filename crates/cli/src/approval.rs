//! `palanquin approval`: a second person's word, offline.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use palanquin_trust::keys::{Algorithm, Ed25519Signer, SigningFailed};
use palanquin_trust::passport::date;
use palanquin_trust::signed::ENVELOPE_MAX;
use palanquin_trust::{Action, Approval, Keyring, PublicKey, Sign, Signed};
use serde_json::{Value, json};

use crate::arguments::{ApprovalArgs, ApprovalCommand, ApprovedAction};
use crate::commands::show;
use crate::failure::Failure;
use crate::files::{NewFiles, failed, read};
use crate::output::line;
use crate::passport::private_block;

/// Does what was typed.
pub(crate) fn run(command: &ApprovalCommand, json: bool) -> Result<(), Failure> {
    match command {
        ApprovalCommand::Sign(arguments) => sign(arguments, json),
        ApprovalCommand::Show { file } => peek(file, json),
    }
}

/// A key as `palanquin ca issue` makes it.
struct P256Signer(EcdsaKeyPair, PublicKey);

impl Sign for P256Signer {
    fn public_key(&self) -> PublicKey {
        self.1.clone()
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SigningFailed> {
        let signature = self.0.sign(&SystemRandom::new(), message);
        Ok(signature.map_err(|_| SigningFailed)?.as_ref().to_vec())
    }
}

/// A private key of either kind that signs documents.
fn signer(path: &Path) -> Result<Box<dyn Sign>, Failure> {
    let der = private_block(path)?;
    if let Ok(key) = Ed25519Signer::from_pkcs8(&der) {
        return Ok(Box::new(key));
    }
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &der).ok();
    let key = pair.and_then(|pair| {
        let public = PublicKey::from_raw(Algorithm::EcdsaP256, pair.public_key().as_ref()).ok()?;
        Some(P256Signer(pair, public))
    });
    key.map(|key| Box::new(key) as Box<dyn Sign>)
        .ok_or_else(|| {
            let what = format!("{} is no key that is of use here", path.display());
            Failure::usage(what)
                .cause("it is neither of Ed25519 nor of ECDSA on P-256")
                .hint("`palanquin ca issue operator` makes NAME.key")
        })
}

fn told(approval: &Approval) -> Value {
    json!({
        "operator": approval.operator,
        "action": approval.action,
        "vm": approval.vm,
        "from": approval.source,
        "to": approval.target,
        "not_before_unix_s": approval.not_before_unix_s,
        "expires_unix_s": approval.expires_unix_s,
    })
}

fn sign(arguments: &ApprovalArgs, json: bool) -> Result<(), Failure> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_err(|error| failed("the clock is before 1970", error))?;
    let action = match arguments.action {
        ApprovedAction::Migrate => Action::MigrateOut,
        ApprovedAction::Adopt => Action::Adopt,
        ApprovedAction::Abort => Action::Abort,
        ApprovedAction::Erase => Action::Erase,
    };
    let target = arguments.to.as_ref().unwrap_or(&arguments.from);
    let approval = Approval {
        operator: arguments.operator.clone(),
        action: action.name().to_owned(),
        vm: arguments.vm,
        source: arguments.from.clone(),
        target: target.clone(),
        not_before_unix_s: now.as_secs(),
        expires_unix_s: now.as_secs() + arguments.hold.as_millis() / 1000,
    };
    if action == Action::MigrateOut && target == &arguments.from {
        return Err(Failure::usage("the VM would not move").hint("name its new host with --to"));
    }
    let signer = signer(&arguments.key)?;
    let signed = Signed::sign(&approval, signer.as_ref())
        .map_err(|error| Failure::usage("this cannot be approved").cause(error))?;
    // What is handed out is what others will verify.
    let mut ring = Keyring::default();
    ring.insert(approval.operator.clone(), signer.public_key())
        .map_err(|error| failed("cannot use the key", error))?;
    signed.verify(&ring, now.as_secs()).map_err(|error| {
        Failure::usage("the approval that was signed does not verify").cause(error)
    })?;
    let mut files = NewFiles::default();
    files.write(&arguments.out, signed.as_bytes(), 0o644)?;
    files.keep();
    let text = |_: &Value| {
        let (until, out) = (date(approval.expires_unix_s), arguments.out.display());
        format!("Wrote an approval that holds until {until} to {out}.\n")
    };
    show(&told(&approval), text, json)
}

fn peek(file: &Path, json: bool) -> Result<(), Failure> {
    let no_approval = || Failure::usage(format!("{} is no signed approval", file.display()));
    let signed = Signed::<Approval>::from_bytes(&read(file, ENVELOPE_MAX)?)
        .map_err(|error| no_approval().cause(error))?;
    let shown = signed.peek().map_err(|error| no_approval().cause(error))?;
    let value = json!({
        "verified": false,
        "sha256": signed.sha256(),
        "key_id": signed.key_id(),
        "approval": shown,
    });
    let text = |_: &Value| {
        let lines: Vec<_> = shown.to_string().lines().map(line).collect();
        let (lines, key) = (lines.join("\n"), signed.key_id());
        format!("{lines}\nsigned by    {key}\n\nNobody has checked the signature: the hosts do.\n")
    };
    show(&value, text, json)
}
