//! What others sign, what a TPM says, and what a provider writes.

use std::collections::BTreeSet;
use std::fmt::Debug;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use coset::iana::Algorithm as Number;
use coset::{CoseSign1Builder, HeaderBuilder, TaggedCborSerializable};
use palanquin_agent::gate::credentials::Credentials;
use palanquin_api::control::Strategy;
use palanquin_trust::advertisement::{PARCEL_MAX, Parcel};
use palanquin_trust::enrolment::{Answer, Enrolled, Pending, Question, Request, read_registers};
use palanquin_trust::evidence::public::{AttestationKey, EndorsementKey};
use palanquin_trust::evidence::{
    Challenge, EVIDENCE_MAX, Expectation, LOG_MAX, Log, Measured, Role,
};
use palanquin_trust::keys::{Algorithm, Ed25519Signer};
use palanquin_trust::policy::{Case, Files};
use palanquin_trust::signed::{Document, ENVELOPE_MAX};
use palanquin_trust::{
    Action, Advertisement, Approval, Evidence, Identity, Keyring, Order, Passport, Policies,
    PublicKey, Sha256, Sign, Signed,
};
use uuid::Uuid;

use super::{seeds_of, within, words_of};
use crate::entry::Target;

/// Most bytes that reading may take for each of its own.
const EXPANSION: usize = 256;
/// What errors and the like may take besides.
const SLACK: usize = 64 << 10;

/// Envelopes.
pub(crate) const ENVELOPE: Target = Target::new("envelope", envelope, || {
    let mut seeds: Vec<_> = contents()
        .into_iter()
        .map(|(which, bytes)| sealed(which, bytes))
        .collect();
    let passport = seeds[0].clone();
    seeds.push([&b"\xd8\x12"[..], &passport[1..]].concat());
    seeds.push([&passport[..], b"\0"].concat());
    seeds.push(b"\xd2\x84\x5b\xff\xff\xff\xff\xff\xff\xff\xff".to_vec());
    seeds.push(b"\xd2\x84\x40\xa0\x5a\xff\xff\xff\xff".to_vec());
    seeds.push([&[0xd2, 0x84][..], &[0x81; 4000]].concat());
    let parcel = Parcel {
        envelope: passport.into(),
        certificates: vec![vec![0x30; 500].into(), vec![0x30; 400].into()],
    };
    seeds.extend(parcel.to_bytes());
    seeds.push(b"\xa2\x00\x40\x01\x9b\xff\xff\xff\xff\xff\xff\xff\xff".to_vec());
    seeds
});

/// A byte that says which document, and its contents.
pub(crate) const DOCUMENTS: Target = Target::new("documents", documents, || {
    let with = |(which, bytes): (u8, Vec<u8>)| [vec![which], bytes].concat();
    let mut seeds: Vec<_> = contents().into_iter().map(with).collect();
    // Lists and texts longer than there are bytes.
    seeds.push(b"\x00\xbb\xff\xff\xff\xff\xff\xff\xff\xff".to_vec());
    seeds.push(b"\x00\xa1\x0a\x9b\xff\xff\xff\xff\xff\xff\xff\xff\x00".to_vec());
    seeds
});

/// A byte that says which, and evidence, a quote, a log of firmware, a key's public area, or a text of an enrolment.
pub(crate) const EVIDENCE: Target = Target::new("evidence", evidence, || {
    let binding = challenge().binding(&measured());
    let quotes = [attest(&binding.0), attest(&[0; 32]), attest(&[])];
    let mut seeds: Vec<_> = quotes
        .iter()
        .map(|quote| [&[1][..], quote].concat())
        .collect();
    let evidence = Evidence::new(measured(), quotes[0].clone(), vec![0; 72]);
    seeds.push([vec![0], evidence.to_bytes()].concat());
    seeds.push([&[2][..], &log()].concat());
    seeds.push([&[3][..], ATTESTATION_KEY, &[5; 32], b"\0\x20", &[6; 32]].concat());
    seeds.push([&[3][..], ENDORSEMENT_KEY, &[0xc1; 256]].concat());
    seeds.push([&[4][..], ENROLLED.as_bytes()].concat());
    let values = vec![Sha256([7; 32]); 8];
    let whole = Evidence::new(measured(), quotes[0].clone(), vec![0; 72]).with_registers(values);
    let whole = Log::read(&log()).map(|log| whole.with_log(log));
    seeds.extend(whole.map(|evidence| [vec![0], evidence.to_bytes()].concat()));
    seeds
});

/// Public areas without what is random in them: ECDSA on P-256, and RSA with 2048 bits.
const ATTESTATION_KEY: &[u8] = b"\0\x23\0\x0b\0\x05\0\x72\0\0\0\x10\0\x18\0\x0b\0\x03\0\x10\0\x20";
const ENDORSEMENT_KEY: &[u8] =
    b"\0\x01\0\x0b\0\x03\0\xb2\0\0\0\x06\0\x80\0\x43\0\x10\x08\0\0\0\0\0\x01\0";

const ENROLLED: &str = "host = \"spiffe://example.org/host/beta\"\nattestation-key = \"3059\"\n\
    endorsement-key = \"sha256:0000000000000000000000000000000000000000000000000000000000000000\"\n\
    reset-count = 5\nenrolled-unix-s = 1\n[[register]]\nnumber = 7\n\
    allowed = [\"sha256:0000000000000000000000000000000000000000000000000000000000000000\"]\n";

/// A log with one event in register 7.
fn log() -> Vec<u8> {
    let banks = b"Spec ID Event03\0\0\0\0\0\0\x02\0\x02\x01\0\0\0\x0b\0\x20\0\0";
    let len = [banks.len() as u8, 0, 0, 0];
    let event = b"\x07\0\0\0\x04\0\0\0\x01\0\0\0\x0b\0";
    let head = [&b"\0\0\0\0\x03\0\0\0"[..], &[0; 20], &len, banks].concat();
    [&head[..], event, &[0xb7; 32], &[0; 4]].concat()
}

/// A file of policies.
pub(crate) const POLICIES: Target = Target::new("policies", policies, || {
    seeds_of(&[
        "@id(\"a\") permit(principal in Role::\"r\", action, resource) when { principal.tenants.contains(resource.tenant) };",
        "@id(\"a\") forbid(principal, action == Action::\"abort\", resource) unless { context has targetAttestation && context.targetAttestation.ageS <= 6 };",
        "@id(\"a\") permit(principal, action, resource) when { context.now.toTime() >= duration(\"2h\") && 1 + 2 * resource.sensitivity < -4 };",
        "@id(\"a\") forbid(principal, action, resource) when { if resource.legalHold then context.target in HostGroup::\"g\" else [1, 2].contains(3) };",
        "@id(\"a\") permit(principal == ?principal, action, resource);",
        "@id(\"a\") permit(principal, action, resource) when { ((((((((((((((((((((((((((((((((((((((true",
        "// nothing",
        "",
    ])
})
.words(|| {
    words_of(&[
        "@id(\"", "permit(", "forbid(", "principal", "action", "resource", "context", " when { ", " unless { ", "};",
        ".tenants", ".domain", ".tenant", ".sensitivity", ".legalHold", ".source", ".target", ".region", ".quarantined",
        ".targetAttestation", ".ageS", ".now", ".toTime()", "duration(\"1h\")", "datetime(\"2027-01-01\")", ".contains(",
        ".containsAll(", ".containsAny(", ".isEmpty()", " has ", " like ", " in ", " is ", "Role::\"r\"", "HostGroup::\"g\"",
        "Action::\"migrateOut\"", "if ", " then ", " else ", " && ", " || ", "9223372036854775807",
    ])
});

/// What comes with an offer.
pub(crate) const CREDENTIALS: Target = Target::new("credentials", credentials, || {
    let credentials = Credentials {
        order: vec![1; 300].into(),
        passport: vec![2; 200].into(),
        approvals: vec![vec![3; 100].into(), Vec::new().into()],
        evidence: Vec::new().into(),
    };
    let bytes = credentials.to_bytes().expect("short");
    // A length that nothing follows, and a map without end.
    vec![
        bytes,
        b"\xa1\x00\x5b\xff\xff\xff\xff\xff\xff\xff\xff".to_vec(),
        b"\xbf\x02\x9f".to_vec(),
    ]
});

fn credentials(data: &[u8]) {
    let read = within(data.len() * 8 + (64 << 10), || {
        Credentials::from_bytes(data)
    });
    if let Ok(credentials) = read {
        let bytes = credentials.to_bytes().expect("no longer than it was");
        assert_eq!(Credentials::from_bytes(&bytes), Ok(credentials));
    }
}

fn id(uri: &str) -> Identity {
    format!("spiffe://example.org/{uri}")
        .parse()
        .expect("an identity")
}

fn signer() -> Ed25519Signer {
    Ed25519Signer::from_seed(&[1; 32]).expect("a key")
}

/// The one key is that of whoever it must be.
fn ring(identity: Identity) -> Keyring {
    let mut ring = Keyring::default();
    ring.insert(identity, signer().public_key())
        .expect("one key");
    ring
}

/// Of each kind of document, by its number.
fn signers() -> [Identity; 4] {
    [
        id("owner/acme"),
        id("host/alpha"),
        id("operator/bob"),
        id("host/beta"),
    ]
}

fn passport() -> Passport {
    let names = |list: &[&str]| Some(list.iter().map(|name| (*name).to_owned()).collect());
    Passport {
        vm: Uuid::from_bytes([2; 16]),
        owner: id("owner/acme"),
        version: 3,
        not_before_unix_s: 1_790_000_000,
        expires_unix_s: 1_890_000_000,
        sensitivity: 2,
        hosts: Some(vec![id("host/alpha"), id("host/beta")]),
        groups: names(&["g"]),
        regions: names(&["de", "fr"]),
        roles: names(&["r"]),
        strategies: Some(vec![Strategy::Auto, Strategy::Hybrid]),
        attestation: Some(palanquin_trust::passport::Demands {
            max_age_s: 60,
            boots: Some(vec![Sha256([7; 32])]),
            hypervisors: None,
            policy_version_min: Some(5),
        }),
    }
}

/// Contents of each kind of document, with its number.
fn contents() -> Vec<(u8, Vec<u8>)> {
    let order = Order {
        migration: Uuid::from_bytes([1; 16]),
        vm: Uuid::from_bytes([2; 16]),
        vm_name: "web".to_owned(),
        epoch: 4,
        source: id("host/alpha"),
        destination: id("host/beta"),
        operator: id("operator/alice"),
        issued_unix_s: 1_800_000_000,
        expires_unix_s: 1_800_000_300,
        strategy: Strategy::Auto,
        post_copy: false,
        run: true,
        policy_sha256: Sha256([3; 32]),
        passport_sha256: Sha256([4; 32]),
    };
    let approval = Approval {
        operator: id("operator/bob"),
        action: "migrateOut".to_owned(),
        vm: Uuid::from_bytes([2; 16]),
        source: id("host/alpha"),
        target: id("host/beta"),
        not_before_unix_s: 1_800_000_000,
        expires_unix_s: 1_800_003_600,
    };
    let advertisement = Advertisement {
        host: id("host/beta"),
        audience: id("host/alpha"),
        sequence: 7,
        issued_unix_s: 1_800_000_000,
        expires_unix_s: 1_800_000_600,
        memory_total_bytes: 64 << 30,
        memory_free_bytes: 16 << 30,
        cpu_threads: 8,
        hypervisor_version: "8.2.2".to_owned(),
        hypervisor_sha256: Some(Sha256([9; 32])),
        region: Some("de".to_owned()),
        groups: vec!["bronze".to_owned(), "gold".to_owned()],
    };
    let bare = Advertisement {
        hypervisor_sha256: None,
        region: None,
        groups: Vec::new(),
        ..advertisement.clone()
    };
    let free = Passport {
        hosts: None,
        groups: None,
        regions: None,
        roles: None,
        strategies: None,
        attestation: None,
        ..passport()
    };
    vec![
        (0, to_cbor(&passport())),
        (0, to_cbor(&free)),
        (1, to_cbor(&order)),
        (2, to_cbor(&approval)),
        (3, to_cbor(&advertisement)),
        (3, to_cbor(&bare)),
    ]
}

fn to_cbor<T: minicbor::Encode<()>>(value: &T) -> Vec<u8> {
    minicbor::to_vec(value).expect("a vector takes everything")
}

/// An envelope as it must be, around anything.
fn sealed(which: u8, contents: Vec<u8>) -> Vec<u8> {
    let kinds = [
        Passport::CONTENT_TYPE,
        Order::CONTENT_TYPE,
        Approval::CONTENT_TYPE,
        Advertisement::CONTENT_TYPE,
    ];
    let protected = HeaderBuilder::new()
        .algorithm(Number::Ed25519)
        .content_type(kinds[usize::from(which % 4)].to_owned())
        .key_id(signer().public_key().id().0.to_vec())
        .build();
    CoseSign1Builder::new()
        .protected(protected)
        .payload(contents)
        .create_signature(&[], |message| signer().sign(message).expect("a signature"))
        .build()
        .to_tagged_vec()
        .expect("an envelope")
}

fn envelope(data: &[u8]) {
    judge::<Passport>(data);
    judge::<Order>(data);
    judge::<Approval>(data);
    judge::<Advertisement>(data);
    parcel(data);
}

/// An advertisement with certificates, none of which are verified here.
fn parcel(data: &[u8]) {
    let read = within(data.len() * EXPANSION + SLACK, || Parcel::from_bytes(data));
    if let Ok(parcel) = read {
        assert!(data.len() <= PARCEL_MAX && !parcel.certificates.is_empty());
        assert_eq!(parcel.to_bytes().as_deref(), Ok(data));
    }
}

fn judge<T: Document>(data: &[u8]) {
    let read = || Signed::<T>::from_bytes(data);
    let Ok(signed) = within(data.len() * EXPANSION + SLACK, read) else {
        return;
    };
    assert!(data.len() <= ENVELOPE_MAX && signed.as_bytes() == data);
    assert!(signed.verify_lapsed(&Keyring::default()).is_err());
    for identity in signers() {
        if let Ok(document) = signed.verify_lapsed(&ring(identity.clone())) {
            assert_eq!(
                (signed.key_id(), document.signer()),
                (signer().public_key().id(), &identity)
            );
        }
    }
}

fn documents(data: &[u8]) {
    let Some((which, contents)) = data.split_first() else {
        return;
    };
    let bytes = sealed(*which, contents.to_vec());
    let identity = signers()[usize::from(which % 4)].clone();
    match which % 4 {
        0 => {
            if let Some(passport) = believed::<Passport>(&bytes, identity) {
                assert!(!passport.to_string().is_empty());
            }
        }
        1 => drop(believed::<Order>(&bytes, identity)),
        2 => drop(believed::<Approval>(&bytes, identity)),
        _ => {
            if let Some(says) = believed::<Advertisement>(&bytes, identity) {
                assert!(says.memory_free_bytes <= says.memory_total_bytes);
                assert!(!says.to_string().is_empty());
            }
        }
    }
}

fn believed<T: Document + Clone + PartialEq + Debug>(
    bytes: &[u8],
    identity: Identity,
) -> Option<T> {
    let signed = Signed::<T>::from_bytes(bytes).ok()?;
    let ring = ring(identity);
    let verify = || signed.verify_lapsed(&ring);
    let document = within(bytes.len() * EXPANSION + SLACK, verify).ok()?;
    assert_eq!(document.check(), Ok(()));
    let again = Signed::sign(&*document, &signer()).expect("it was within its bounds");
    assert_eq!(again.as_bytes(), bytes, "there is one form of a document");
    Some((*document).clone())
}

fn challenge() -> Challenge {
    Challenge {
        nonce: [1; 32],
        exporter: [2; 32],
        host: id("host/beta"),
        role: Role::Target,
        vm: Uuid::from_bytes([2; 16]),
        migration: Uuid::from_bytes([1; 16]),
        order_sha256: Sha256([5; 32]),
    }
}

fn measured() -> Measured {
    Measured {
        hypervisor: Some(Sha256([8; 32])),
        command_line: None,
        policy_version: 5,
        policy_sha256: Sha256([6; 32]),
        code: None,
        container: None,
    }
}

/// A quote of eight registers.
fn attest(extra: &[u8]) -> Vec<u8> {
    let head = b"\xff\x54\x43\x47\x80\x18\0\x02\0\x0b\0";
    let tail = b"\0\0\0\0\0\0\0\x4d\0\0\0\x05\0\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\x01\0\x0b\x03\xff\0\0\0\x20";
    [&head[..], &[extra.len() as u8], extra, tail, &[7; 32]].concat()
}

fn evidence(data: &[u8]) {
    let Some((which, rest)) = data.split_first() else {
        return;
    };
    match which % 5 {
        0 => {
            let read = || Evidence::from_bytes(rest);
            if let Ok(evidence) = within(rest.len() * EXPANSION + SLACK, read) {
                assert!(rest.len() <= EVIDENCE_MAX && evidence.to_bytes() == rest);
            }
        }
        1 => quote(rest),
        2 => {
            let read = || Log::read(rest);
            if let Ok(log) = within(rest.len() * EXPANSION + SLACK, read) {
                // Each event has a digest of 32 bytes.
                assert!(rest.len() <= LOG_MAX && log.len() * 32 <= rest.len());
                let registers = (0..24).map(|register| (register, Sha256([0; 32])));
                let explained = log
                    .explain(&registers.collect())
                    .expect("what was read is replayed");
                assert!(
                    explained.values().all(Vec::is_empty),
                    "no digest leads to zeroes"
                );
            }
        }
        3 => {
            if let Ok(key) = AttestationKey::read(rest) {
                assert_eq!(key.name[2..], Sha256::of(rest).0);
                assert_eq!(key.key.algorithm(), Algorithm::EcdsaP256);
            }
            if let Ok(key) = EndorsementKey::read(rest) {
                assert_eq!(key.spki_der().len(), if key.is_rsa() { 294 } else { 91 });
            }
        }
        _ => {
            let Ok(text) = std::str::from_utf8(rest) else {
                return;
            };
            if let Ok(enrolled) = Enrolled::from_toml(text) {
                let again = enrolled
                    .to_toml()
                    .and_then(|text| Enrolled::from_toml(&text));
                assert_eq!(again.expect("what was read is written"), enrolled);
            }
            let _ = (
                Request::from_toml(text),
                Question::from_toml(text),
                Answer::from_toml(text),
            );
            let _ = (Pending::from_toml(text), read_registers(text));
        }
    }
}

fn quote(rest: &[u8]) {
    let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key");
    let public =
        PublicKey::from_raw(Algorithm::EcdsaP256, key.public_key().as_ref()).expect("a key");
    let raw = key.sign(&SystemRandom::new(), rest).expect("a signature");
    let (r, s) = raw.as_ref().split_at(32);
    let signature = [&b"\0\x18\0\x0b\0\x20"[..], r, b"\0\x20", s].concat();
    let expected = Expectation {
        key: &public,
        pcrs: 0x81,
        reset_count_min: 5,
        lifetime_s: 60,
    };
    let evidence = Evidence::new(measured(), rest.to_vec(), signature);
    if let Ok(claims) = evidence.verify(challenge(), &expected, 1000) {
        let quote = claims.quote();
        assert_eq!(quote.extra, challenge().binding(&measured()).0);
        assert!(quote.pcrs & 0x81 == 0x81 && quote.reset_count >= 5 && quote.pcrs < 1 << 24);
        assert!(rest.starts_with(b"\xff\x54\x43\x47\x80\x18"));
    }
}

const DIRECTORY: &str = "version = 1\nroles = [\"r\"]\ngroups = [\"g\"]\n\
    [operators.\"spiffe://example.org/operator/alice\"]\nroles = [\"r\"]\ntenants = [\"spiffe://example.org/owner/acme\"]\n\
    [hosts.\"spiffe://example.org/host/alpha\"]\nregion = \"de\"\n\
    [hosts.\"spiffe://example.org/host/beta\"]\ngroups = [\"g\"]\n";

fn policies(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let files = Files {
        policies: [("a.cedar".to_owned(), text.to_owned())].into(),
        directory: DIRECTORY.to_owned(),
    };
    let policies = match Policies::load(&files) {
        Ok(policies) => policies,
        Err(error) => return assert!(!error.0.is_empty()),
    };
    let case = |operator: &str, action| Case {
        action,
        operator: id(operator),
        vm: passport().vm,
        passport: Some(passport()),
        approvers: BTreeSet::new(),
        source: id("host/alpha"),
        target: id("host/beta"),
        source_claims: None,
        target_claims: None,
        strategy: Strategy::Auto,
        post_copy: false,
        now_unix_s: 1_800_000_000,
    };
    for action in Action::ALL {
        let decision = policies.explain(&case("operator/alice", action)).decision;
        assert_eq!(decision.permitted, decision.reasons.is_empty());
        assert!(!decision.permitted || !decision.permitted_by.is_empty());
        assert!(
            !policies
                .rehearse(&case("operator/mallory", action))
                .permitted
        );
    }
}
