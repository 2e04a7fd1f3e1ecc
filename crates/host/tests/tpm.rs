//! A TPM that is not ours: `swtpm`, started by each test.
#![forbid(unsafe_code)]
#![cfg(feature = "tpm")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use palanquin_host::tpm::{EndorsementKind, QUICK, Tpm, TpmError, credential};
use palanquin_lab::tpm::Swtpm;
use palanquin_trust::evidence::Quote;
use palanquin_trust::evidence::public::{AttestationKey, EndorsementKey};
use palanquin_trust::{PublicKey, Sha256};
use rustix::process::Signal;

const REGISTERS: u32 = 1 | 1 << 4 | 1 << 7;

/// A TPM, and where its state lies.
fn swtpm() -> (tempfile::TempDir, Swtpm) {
    let dir = tempfile::tempdir().unwrap();
    let tpm = Swtpm::start(dir.path()).unwrap();
    (dir, tpm)
}

/// Another program may use it now: ours lets go of one that serves one at a time after two seconds, or when it ends.
fn with<T>(tpm: &Swtpm, work: impl FnOnce(&Tpm) -> T) -> T {
    work(&Tpm::open(&tpm.tcti()).unwrap())
}

fn key_of(public: &[u8]) -> PublicKey {
    AttestationKey::read(public).unwrap().key
}

#[test]
fn a_quote_is_believed_by_those_who_know_the_key_and_has_what_the_registers_hold() {
    let (_dir, swtpm) = swtpm();
    swtpm.extend(7, [0xab; 32]).unwrap();
    with(&swtpm, |tpm| {
        let key = tpm.make_attestation_key().unwrap();
        let quoted = tpm.quote(&key, REGISTERS, &[5; 32]).unwrap();
        let quote = Quote::verify(&quoted.attest, &quoted.signature, &key_of(&key.public)).unwrap();
        assert_eq!((quote.pcrs, &quote.extra[..]), (REGISTERS, &[5; 32][..]));
        let values: Vec<Sha256> = quoted.registers.values().copied().map(Sha256).collect();
        let registers = quote.registers(&values).unwrap();
        assert_eq!(registers[&0], Sha256([0; 32]));
        assert_eq!(registers[&7], Sha256::of_parts(&[&[0; 32], &[0xab; 32]]));
        let other = tpm.make_attestation_key().unwrap();
        assert!(Quote::verify(&quoted.attest, &quoted.signature, &key_of(&other.public)).is_err());
        // All registers, of which a TPM tells eight at a time.
        assert_eq!(tpm.registers(0xff_ffff).unwrap().len(), 24);
        assert!(matches!(tpm.registers(0), Err(TpmError::Registers(0))));
        let long = tpm.quote(&key, REGISTERS, &[0; 65]);
        assert!(matches!(long, Err(TpmError::Length(_))));
    });
}

#[test]
fn a_key_outlives_the_host_that_is_started_again_and_the_reset_is_counted() {
    let (_dir, swtpm) = swtpm();
    let resets = |key| {
        with(&swtpm, |tpm| {
            let quoted = tpm.quote(key, REGISTERS, b"x").unwrap();
            let quote = Quote::verify(&quoted.attest, &quoted.signature, &key_of(&key.public));
            quote.unwrap().reset_count
        })
    };
    let key = with(&swtpm, |tpm| tpm.make_attestation_key().unwrap());
    let before = resets(&key);
    swtpm.restart().unwrap();
    assert_eq!(resets(&key), before + 1);
}

#[test]
fn a_challenge_made_without_a_tpm_is_opened_by_the_one_it_is_for_and_by_no_other() {
    let (_one, first) = swtpm();
    let (_two, second) = swtpm();
    for kind in [EndorsementKind::Rsa2048, EndorsementKind::EccP256] {
        let (key, endorsement) = with(&first, |tpm| {
            let key = tpm.make_attestation_key().unwrap();
            (key, tpm.endorsement(kind).unwrap())
        });
        assert!(endorsement.certificate.is_none());
        let public = EndorsementKey::read(&endorsement.public).unwrap();
        let name = AttestationKey::read(&key.public).unwrap().name;
        let made = credential::make(public.spki_der(), &name, &[7; 32]).unwrap();
        let open = |tpm: &Tpm, key: &_| tpm.activate(key, kind, &made.credential, &made.secret);
        assert_eq!(with(&first, |tpm| open(tpm, &key)).unwrap(), [7; 32]);
        // The same TPM with another key, and another TPM.
        let other = with(&first, |tpm| {
            let other = tpm.make_attestation_key().unwrap();
            open(tpm, &other)
        });
        assert_eq!(other.unwrap_err().code(), "tpm-foreign");
        let foreign = with(&second, |tpm| {
            let own = tpm.make_attestation_key().unwrap();
            [open(tpm, &own), open(tpm, &key)]
        });
        for result in foreign {
            assert_eq!(result.unwrap_err().code(), "tpm-foreign");
        }
    }
}

#[test]
fn the_certificate_of_the_manufacturer_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let (state, authority) = (dir.path().join("tpm"), dir.path().join("ca"));
    Swtpm::manufacture(&state, &authority).unwrap();
    let swtpm = Swtpm::start(&state).unwrap();
    let endorsement = with(&swtpm, |tpm| tpm.endorsement(EndorsementKind::Rsa2048)).unwrap();
    let certificate = endorsement.certificate.unwrap();
    let spki = EndorsementKey::read(&endorsement.public).unwrap();
    let spki = spki.spki_der();
    assert!(certificate.windows(256).any(|part| part == &spki[33..289]));
}

#[test]
fn a_secret_is_given_out_only_while_the_registers_hold_what_they_did() {
    let (_dir, swtpm) = swtpm();
    let (_other, foreign) = self::swtpm();
    let sealed = with(&swtpm, |tpm| {
        let sealed = tpm.seal(REGISTERS, b"secret").unwrap();
        assert_eq!(tpm.unseal(&sealed).unwrap(), b"secret");
        assert!(matches!(tpm.seal(REGISTERS, &[]), Err(TpmError::Length(_))));
        assert!(matches!(
            tpm.seal(REGISTERS, &[0; 129]),
            Err(TpmError::Length(_))
        ));
        sealed
    });
    // Of a register that it is not sealed to, nothing is asked.
    swtpm.extend(9, [1; 32]).unwrap();
    assert!(with(&swtpm, |tpm| tpm.unseal(&sealed)).is_ok());
    swtpm.extend(4, [1; 32]).unwrap();
    swtpm.extend(7, [1; 32]).unwrap();
    let error = with(&swtpm, |tpm| tpm.unseal(&sealed)).unwrap_err();
    assert!(
        matches!(&error, TpmError::Changed(changed) if changed == &[4, 7]),
        "{error}"
    );
    // Lying about what it was sealed to does not help.
    let mut lying = sealed.clone();
    lying.registers = with(&swtpm, |tpm| tpm.registers(REGISTERS)).unwrap();
    let error = with(&swtpm, |tpm| tpm.unseal(&lying)).unwrap_err();
    assert!(matches!(error, TpmError::Refused { .. }), "{error}");
    lying.registers.retain(|register, _| *register == 0);
    assert!(with(&swtpm, |tpm| tpm.unseal(&lying)).is_err());
    let error = with(&foreign, |tpm| tpm.unseal(&sealed)).unwrap_err();
    assert_eq!(error.code(), "tpm-foreign");
    swtpm.restart().unwrap();
    assert_eq!(with(&swtpm, |tpm| tpm.unseal(&sealed)).unwrap(), b"secret");
}

#[test]
fn a_tpm_that_hangs_or_is_gone_costs_a_bounded_time_and_one_that_comes_back_is_used() {
    let (_dir, swtpm) = swtpm();
    let tpm = Tpm::open(&swtpm.tcti()).unwrap();
    let key = tpm.make_attestation_key().unwrap();
    tpm.quote(&key, REGISTERS, b"before").unwrap();
    swtpm.signal(Signal::STOP).unwrap();
    let began = Instant::now();
    let error = tpm.quote(&key, REGISTERS, b"hangs").unwrap_err();
    assert_eq!(error.code(), "tpm-timeout", "{error}");
    assert!(began.elapsed() < QUICK + Duration::from_secs(2));
    // Nobody waits behind it.
    let began = Instant::now();
    assert_eq!(tpm.registers(1).unwrap_err().code(), "tpm-timeout");
    assert!(began.elapsed() < Duration::from_secs(2));
    swtpm.signal(Signal::CONT).unwrap();
    palanquin_lab::wait::until_true("the TPM answers again", Duration::from_secs(20), || {
        Ok(tpm.quote(&key, REGISTERS, b"again").is_ok())
    })
    .unwrap();
    swtpm.off().unwrap();
    let began = Instant::now();
    let error = tpm.quote(&key, REGISTERS, b"gone").unwrap_err();
    assert_eq!(error.code(), "tpm-unreachable", "{error}");
    assert!(began.elapsed() < Duration::from_secs(5));
    swtpm.on().unwrap();
    tpm.quote(&key, REGISTERS, b"back").unwrap();
}
