//! `palanquin attest`: a host becomes known by its TPM, and files are sealed to what it has measured.

mod manufacturer;

use std::fs;
use std::io::ErrorKind as IoErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use palanquin_api::control::{Blocker, ErrorKind, Side};
use palanquin_host::tpm::sealed::{CONTENTS_MAX, is_sealed, seal};
use palanquin_host::tpm::{EndorsementKind, KeyBlob, Tpm, TpmError, credential};
use palanquin_trust::enrolment::{
    Answer, EnrolError, Enrolled, Hex, Pending, Question, Request, TEXT_MAX, read_registers,
};
use palanquin_trust::evidence::{LOG_MAX, Log};
use palanquin_trust::{Identity, Sha256};
use serde_json::{Value, json};

use crate::arguments::{
    AttestAnswer, AttestChallenge, AttestCommand, AttestRequest, EndorsementArg,
};
use crate::commands::show;
use crate::failure::Failure;
use crate::files::{NewFiles, failed, read, read_text};
use crate::policy;

/// Longest file with a key, in bytes.
const KEY_MAX: usize = 4096;

/// Does what was typed.
pub(crate) fn run(command: &AttestCommand, json: bool) -> Result<(), Failure> {
    match command {
        AttestCommand::Request(arguments) => request(arguments, json),
        AttestCommand::Challenge(arguments) => challenge(arguments, json),
        AttestCommand::Answer(arguments) => answer(arguments, json),
        AttestCommand::Accept {
            pending,
            answer,
            registers,
            out,
        } => accept(pending, answer, registers.as_deref(), out, json),
        AttestCommand::Seal {
            file,
            tpm,
            registers,
            policies,
            out,
        } => seal_file(file, &tpm.tpm, registers, policies.as_deref(), out, json),
    }
}

fn tpm_failed(error: &TpmError) -> Failure {
    let kind = match error {
        TpmError::Name(_) | TpmError::Length(_) | TpmError::Registers(_) => ErrorKind::Usage,
        TpmError::Foreign(_) | TpmError::Changed(_) => ErrorKind::Refused,
        _ => ErrorKind::Internal,
    };
    let failure = Failure::new(kind, format!("the TPM has not done it ({})", error.code()));
    let failure = failure.cause(error);
    match error {
        TpmError::Unreachable { .. } => {
            failure.hint("is there a TPM, and is this run as root? --tpm names it")
        }
        TpmError::NotBuilt => failure.hint("build it with the feature `tpm`"),
        _ => failure,
    }
}

fn open(name: &str) -> Result<Tpm, Failure> {
    Tpm::open(name).map_err(|error| tpm_failed(&error))
}

/// What was written by somebody else and is not as it must be.
fn refused(what: &str, error: EnrolError) -> Failure {
    let kind = match error {
        EnrolError::TooLong(_) | EnrolError::Syntax(_) | EnrolError::Policy(_) => ErrorKind::Usage,
        _ => ErrorKind::Refused,
    };
    let mut failure = Failure::new(kind, what.to_owned()).cause(&error);
    if let EnrolError::Findings(findings) = error {
        let blocker = |finding: palanquin_trust::evidence::registers::Finding| Blocker {
            gate: Some("attestation".to_owned()),
            side: Side::Destination,
            code: finding.code.to_owned(),
            message: finding.to_string(),
            remedy: finding.remedy,
        };
        failure.0.blockers = findings.into_iter().map(blocker).collect();
    }
    failure
}

fn kind(endorsement: EndorsementArg) -> EndorsementKind {
    match endorsement {
        EndorsementArg::Rsa => EndorsementKind::Rsa2048,
        EndorsementArg::Ecc => EndorsementKind::EccP256,
    }
}

fn pcrs(registers: &[u8]) -> u32 {
    registers
        .iter()
        .fold(0, |pcrs, register| pcrs | 1 << register)
}

/// The key of this host, or a new one.
fn key(path: &Path, tpm: &Tpm, files: &mut NewFiles) -> Result<KeyBlob, Failure> {
    match fs::metadata(path) {
        Ok(_) => read_key(path),
        Err(error) if error.kind() == IoErrorKind::NotFound => {
            let key = tpm.make_attestation_key();
            let key = key.map_err(|error| tpm_failed(&error))?;
            files.write(path, key.to_bytes(), 0o600)?;
            Ok(key)
        }
        Err(error) => Err(Failure::usage(format!("cannot read {}", path.display())).cause(error)),
    }
}

fn read_key(path: &Path) -> Result<KeyBlob, Failure> {
    KeyBlob::from_bytes(&read(path, KEY_MAX)?).map_err(|error| {
        Failure::usage(format!("{} is no key of a TPM", path.display())).cause(error)
    })
}

fn request(arguments: &AttestRequest, json: bool) -> Result<(), Failure> {
    let tpm = open(&arguments.tpm.tpm)?;
    let mut files = NewFiles::default();
    let key = key(&arguments.key, &tpm, &mut files)?;
    // Also shows that this TPM has made the key.
    tpm.warm(&key).map_err(|error| tpm_failed(&error))?;
    let endorsement = tpm.endorsement(kind(arguments.endorsement));
    let endorsement = endorsement.map_err(|error| tpm_failed(&error))?;
    let mut certificates = Vec::new();
    // What lies in the TPM may be longer than the certificate.
    let own = endorsement
        .certificate
        .as_deref()
        .and_then(manufacturer::trimmed);
    let has_certificate = own.is_some();
    certificates.extend(own);
    if let Some(path) = &arguments.certificates {
        certificates.extend(manufacturer::read_pem(path)?);
    }
    let mut registers = arguments.registers.clone();
    registers.sort_unstable();
    registers.dedup();
    let request = Request {
        host: arguments.host.clone(),
        registers,
        attestation_key: Hex(key.public),
        endorsement_key: Hex(endorsement.public),
        certificates: certificates.into_iter().map(Hex).collect(),
    };
    let unusable = |error| refused("this TPM's keys cannot be used", error);
    let (_, endorsement) = request.keys().map_err(unusable)?;
    files.write(&arguments.out, request.to_toml().map_err(unusable)?, 0o644)?;
    files.keep();
    let fingerprint = endorsement.fingerprint();
    let value = json!({
        "host": request.host,
        "endorsement_key": fingerprint,
        "has_certificate": has_certificate,
        "request": arguments.out,
    });
    let text = |_: &Value| {
        let certificate = if has_certificate { "has" } else { "has no" };
        format!(
            "Wrote {}.\nfingerprint  {fingerprint}\nThe TPM {certificate} certificate of its endorsement key.\n",
            arguments.out.display()
        )
    };
    show(&value, text, json)
}

fn read_request(path: &Path) -> Result<Request, Failure> {
    Request::from_toml(&read_text(path, TEXT_MAX)?)
        .map_err(|error| refused(&format!("{} is no usable request", path.display()), error))
}

fn other_host(what: &Path, says: &Identity, expected: &Identity) -> Failure {
    Failure::new(
        ErrorKind::Refused,
        format!("{} is of {says}, not of {expected}", what.display()),
    )
}

fn challenge(arguments: &AttestChallenge, json: bool) -> Result<(), Failure> {
    let path = &arguments.request;
    let request = read_request(path)?;
    if request.host != arguments.host {
        return Err(other_host(path, &request.host, &arguments.host));
    }
    let unusable = |error| refused(&format!("{} is no usable request", path.display()), error);
    let (attestation, endorsement) = request.keys().map_err(unusable)?;
    let fingerprint = endorsement.fingerprint();
    if let Some(expected) = arguments.fingerprint
        && expected != fingerprint
    {
        let what = "the endorsement key is not the one that was confirmed";
        return Err(Failure::new(ErrorKind::Refused, what)
            .cause(format!("it has the fingerprint {fingerprint}"))
            .hint("another TPM than the host's may have made this request"));
    }
    if let Some(ca) = &arguments.ca {
        let certificates: Vec<&[u8]> = request.certificates.iter().map(|der| &der.0[..]).collect();
        manufacturer::verify(&certificates, endorsement.spki_der(), ca)?;
    }
    let mut secret = [0; 32];
    aws_lc_rs::rand::fill(&mut secret)
        .map_err(|error| failed("this machine has no randomness", error))?;
    let made = credential::make(endorsement.spki_der(), &attestation.name, &secret)
        .map_err(|error| failed("the question cannot be made", error))?;
    let question = Question {
        host: request.host.clone(),
        credential: Hex(made.credential),
        secret: Hex(made.secret),
    };
    let pending = Pending {
        secret: Hex(secret.to_vec()),
        request,
    };
    let text = |result: Result<String, EnrolError>| {
        result.map_err(|error| failed("cannot write the question", error))
    };
    let mut files = NewFiles::default();
    files.write(&arguments.out, text(question.to_toml())?, 0o644)?;
    files.write(&arguments.pending, text(pending.to_toml())?, 0o600)?;
    files.keep();
    let by = if arguments.ca.is_some() {
        "the manufacturer's certificate"
    } else {
        "the fingerprint"
    };
    let value = json!({
        "host": arguments.host,
        "endorsement_key": fingerprint,
        "challenge": arguments.out,
        "pending": arguments.pending,
    });
    let text = |_: &Value| {
        let (out, host) = (arguments.out.display(), &arguments.host);
        format!("Wrote {out} for {host}, whose TPM was recognised by {by}.\n")
    };
    show(&value, text, json)
}

fn answer(arguments: &AttestAnswer, json: bool) -> Result<(), Failure> {
    let request = read_request(&arguments.request)?;
    let path = &arguments.challenge;
    let question = Question::from_toml(&read_text(path, TEXT_MAX)?)
        .map_err(|error| refused(&format!("{} is no question", path.display()), error))?;
    if question.host != request.host {
        return Err(other_host(path, &question.host, &request.host));
    }
    let (_, endorsement) = request
        .keys()
        .map_err(|error| refused("the request is not usable", error))?;
    let kind = if endorsement.is_rsa() {
        EndorsementKind::Rsa2048
    } else {
        EndorsementKind::EccP256
    };
    let key = read_key(&arguments.key)?;
    let tpm = open(&arguments.tpm.tpm)?;
    let opened = tpm
        .activate(&key, kind, &question.credential.0, &question.secret.0)
        .and_then(|secret| {
            <[u8; 32]>::try_from(secret).map_err(|_| TpmError::Length("the secret in the question"))
        })
        .map_err(|error| {
            tpm_failed(&error).hint("is this the question that was asked of this host?")
        })?;
    let quoted = tpm
        .quote(&key, request.pcrs(), &request.binding(&opened).0)
        .map_err(|error| tpm_failed(&error))?;
    let log = read_log(&arguments.event_log, request.pcrs());
    let values = quoted.registers.into_values().map(Sha256).collect();
    let answer = Answer::new(quoted.attest, quoted.signature, values, log.as_ref());
    let text = answer.to_toml();
    let text = text.map_err(|error| failed("cannot write the answer", error))?;
    let mut files = NewFiles::default();
    files.write(&arguments.out, text, 0o644)?;
    files.keep();
    let events = log.as_ref().map(Log::len);
    let value = json!({ "host": request.host, "answer": arguments.out, "events": events });
    let text = |_: &Value| {
        let log = match events {
            Some(events) => format!("with {events} measurements of firmware"),
            None => "without a log of what firmware measured".to_owned(),
        };
        format!("Wrote {}, {log}.\n", arguments.out.display())
    };
    show(&value, text, json)
}

/// The log, if there is one that can be read.
fn read_log(path: &Path, pcrs: u32) -> Option<Log> {
    let bytes = read(path, LOG_MAX).ok()?;
    Some(Log::read(&bytes).ok()?.of_registers(pcrs))
}

fn accept(
    pending: &Path,
    answer: &Path,
    registers: Option<&Path>,
    out: &Path,
    json: bool,
) -> Result<(), Failure> {
    let pending_text = read_text(pending, TEXT_MAX)?;
    let kept = Pending::from_toml(&pending_text).map_err(|error| {
        refused(
            &format!("{} is not what `challenge` kept", pending.display()),
            error,
        )
    })?;
    let text = read_text(answer, TEXT_MAX)?;
    let given = Answer::from_toml(&text)
        .map_err(|error| refused(&format!("{} is no answer", answer.display()), error))?;
    let wanted = match registers {
        Some(path) => {
            let policy = read_registers(&read_text(path, TEXT_MAX)?);
            let what = format!("{} does not say what registers may hold", path.display());
            Some(policy.map_err(|error| refused(&what, error))?)
        }
        None => None,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_err(|error| failed("the clock is before 1970", error))?;
    let enrolled = kept
        .accept(&given, wanted.as_ref(), now.as_secs())
        .map_err(|error| refused(&format!("{} is refused", answer.display()), error))?;
    let text = enrolled.to_toml();
    let text = text.map_err(|error| failed("cannot write the enrolment", error))?;
    let mut files = NewFiles::default();
    files.write(out, text, 0o644)?;
    files.keep();
    show(&enrolled, |enrolled| told(enrolled, out), json)
}

fn told(enrolled: &Enrolled, out: &Path) -> String {
    let mut text = format!("Wrote {}: {} is enrolled.\n", out.display(), enrolled.host);
    for register in &enrolled.register {
        let meaning = palanquin_trust::evidence::registers::meaning(register.number);
        text += &format!("register {:2}  {meaning}\n", register.number);
        for value in &register.allowed {
            text += &format!("             {value}\n");
        }
    }
    text
}

fn seal_file(
    file: &Path,
    name: &str,
    registers: &[u8],
    policies: Option<&Path>,
    out: &Path,
    json: bool,
) -> Result<(), Failure> {
    let contents = read(file, CONTENTS_MAX)?;
    if is_sealed(&contents) {
        return Err(Failure::usage(format!(
            "{} is sealed already",
            file.display()
        )));
    }
    let mode = fs::metadata(file).map_or(0, |meta| meta.permissions().mode());
    if mode & 0o077 != 0 {
        let what = format!("{} is open to others than its owner", file.display());
        return Err(Failure::usage(what).hint(format!("chmod 600 {}", file.display())));
    }
    let policies = match policies {
        Some(dir) => Some(policy::digest(dir)?.0),
        None => None,
    };
    let tpm = open(name)?;
    let sealed = seal(&tpm, name, pcrs(registers), &contents, policies)
        .map_err(|error| failed("the file cannot be sealed", error))?;
    let mut files = NewFiles::default();
    files.write(out, sealed, 0o600)?;
    files.keep();
    let value = json!({ "sealed": out, "registers": registers, "policies": policies.map(Sha256) });
    let text = |_: &Value| {
        format!(
            "Wrote {}: it opens on this host while registers {} hold what they do now.\n\
             {} is still there: keep it where this host can't be made to give it away, or destroy it.\n",
            out.display(),
            registers
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(", "),
            file.display()
        )
    };
    show(&value, text, json)
}
