//! Public areas of a TPM's keys: `TPMT_PUBLIC` (TPM 2.0 Library, part 2: Structures, section 12.2.4).
//!
//! They come from a host that wants to be enrolled, so everything in them is checked: that the key can't leave its TPM,
//! what it can be used for, and of which kind it is.

use super::quote::{QuoteError, Reader};
use crate::digest::Sha256;
use crate::keys::{Algorithm, KeyError, PublicKey};

/// Longest public area that is read, in bytes: one of RSA with 2048 bits and a policy has 314.
pub const PUBLIC_MAX: usize = 1024;

/// `TPM_ALG_RSA`, `TPM_ALG_ECC`, `TPM_ALG_AES`, `TPM_ALG_SHA256`, `TPM_ALG_NULL`, `TPM_ALG_ECDSA`, `TPM_ALG_CFB`.
const RSA: u16 = 0x0001;
const ECC: u16 = 0x0023;
const AES: u16 = 0x0006;
const SHA256: u16 = 0x000b;
const NULL: u16 = 0x0010;
const ECDSA: u16 = 0x0018;
const CFB: u16 = 0x0043;
/// `TPM_ECC_NIST_P256`.
const P256: u16 = 0x0003;

/// Bits of `TPMA_OBJECT` (part 2, section 8.3): `fixedTPM`, `fixedParent`, `sensitiveDataOrigin`, `restricted`, `decrypt`,
/// `sign`.
const BOUND: u32 = 1 << 1 | 1 << 4 | 1 << 5;
const RESTRICTED: u32 = 1 << 16;
const DECRYPT: u32 = 1 << 17;
const SIGN: u32 = 1 << 18;

/// DER of a `SubjectPublicKeyInfo` with a modulus of 2048 bits, which follows, and then the exponent (RFC 8017, A.1.1).
const SPKI_RSA_2048: &[u8] = b"\x30\x82\x01\x22\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00\x03\x82\x01\x0f\x00\x30\x82\x01\x0a\x02\x82\x01\x01\x00";
const EXPONENT: &[u8] = b"\x02\x03\x01\x00\x01";

/// The rule that a public area breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublicError {
    /// More than [`PUBLIC_MAX`].
    #[error("{0} bytes, at most {PUBLIC_MAX} are allowed")]
    TooLong(usize),
    /// Not such a structure.
    #[error("not a public area: {0}")]
    Form(#[from] QuoteError),
    /// Another kind of key than is used here.
    #[error("{0}")]
    Kind(&'static str),
    /// It could leave its TPM, or was made outside.
    #[error("the key could leave its TPM, or was not made by it")]
    NotBound,
    /// It could be used for something else.
    #[error("the key is not restricted to {0}")]
    Use(&'static str),
    /// No point of the curve.
    #[error("not a public key: {0}")]
    Key(#[from] KeyError),
}

/// Half of a key of which the other half can't leave a TPM, and signs nothing but what that TPM says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttestationKey {
    /// Verifies quotes.
    pub key: PublicKey,
    /// The TPM's name for the key: algorithm, and digest of its public area.
    pub name: [u8; 34],
}

/// The key by which a TPM is told from all others, as its manufacturer has certified it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndorsementKey {
    spki: Vec<u8>,
    is_rsa: bool,
}

/// What the two kinds have in common.
struct Head {
    kind: u16,
    attributes: u32,
}

fn head(reader: &mut Reader<'_>) -> Result<Head, PublicError> {
    let kind = reader.u16("the kind")?;
    if reader.u16("the name's algorithm")? != SHA256 {
        return Err(PublicError::Kind("the key's name is not made with SHA-256"));
    }
    let attributes = reader.u32("the attributes")?;
    reader.sized(64, "the policy")?;
    if attributes & BOUND != BOUND {
        return Err(PublicError::NotBound);
    }
    Ok(Head { kind, attributes })
}

fn reader(bytes: &[u8]) -> Result<Reader<'_>, PublicError> {
    if bytes.len() > PUBLIC_MAX {
        return Err(PublicError::TooLong(bytes.len()));
    }
    Ok(Reader(bytes))
}

/// Curve P-256, no key derivation, and the point, uncompressed.
fn point(reader: &mut Reader<'_>) -> Result<[u8; 65], PublicError> {
    if reader.u16("the curve")? != P256 {
        return Err(PublicError::Kind("the key is on another curve than P-256"));
    }
    if reader.u16("the key derivation")? != NULL {
        return Err(PublicError::Kind("the key derives others"));
    }
    let mut point = [0; 65];
    point[0] = 4;
    for (at, what) in [(1, "x"), (33, "y")] {
        let number = reader.sized(32, what)?;
        point[at + 32 - number.len()..at + 32].copy_from_slice(number);
    }
    Ok(point)
}

impl AttestationKey {
    /// Takes a public area as that of a key which signs only what its TPM makes: ECDSA on P-256 with SHA-256.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn read(bytes: &[u8]) -> Result<Self, PublicError> {
        let mut reader = reader(bytes)?;
        let head = head(&mut reader)?;
        if head.attributes & (RESTRICTED | SIGN | DECRYPT) != RESTRICTED | SIGN {
            return Err(PublicError::Use("signing what its TPM makes"));
        }
        let scheme = (
            reader.u16("the symmetric cipher")?,
            reader.u16("the scheme")?,
        );
        if head.kind != ECC || scheme != (NULL, ECDSA) || reader.u16("the hash")? != SHA256 {
            return Err(PublicError::Kind(
                "the key is not one of ECDSA with SHA-256",
            ));
        }
        let point = point(&mut reader)?;
        reader.end()?;
        let mut name = [0; 34];
        name[..2].copy_from_slice(&SHA256.to_be_bytes());
        name[2..].copy_from_slice(&Sha256::of(bytes).0);
        Ok(Self {
            key: PublicKey::from_raw(Algorithm::EcdsaP256, &point)?,
            name,
        })
    }
}

impl EndorsementKey {
    /// Takes a public area as that of an endorsement key by the default templates of RSA 2048 and of ECC P-256 (TCG EK
    /// Credential Profile, section B.3).
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn read(bytes: &[u8]) -> Result<Self, PublicError> {
        let mut reader = reader(bytes)?;
        let head = head(&mut reader)?;
        if head.attributes & (RESTRICTED | SIGN | DECRYPT) != RESTRICTED | DECRYPT {
            return Err(PublicError::Use("decrypting for its TPM"));
        }
        let cipher = [
            reader.u16("the symmetric cipher")?,
            reader.u16("the cipher's bits")?,
            reader.u16("the cipher's mode")?,
            reader.u16("the scheme")?,
        ];
        if cipher != [AES, 128, CFB, NULL] {
            return Err(PublicError::Kind(
                "the key is by none of the default templates",
            ));
        }
        let (spki, is_rsa) = match head.kind {
            RSA => {
                let size = (reader.u16("the bits")?, reader.u32("the exponent")?);
                let modulus = reader.sized(256, "the modulus")?;
                // The exponent 0 means 65537.
                if !matches!(size, (2048, 0 | 65537))
                    || modulus.first().is_none_or(|top| *top < 0x80)
                {
                    return Err(PublicError::Kind(
                        "the key is not one of RSA with 2048 bits",
                    ));
                }
                if modulus.len() != 256 {
                    return Err(PublicError::Kind(
                        "the key is not one of RSA with 2048 bits",
                    ));
                }
                ([SPKI_RSA_2048, modulus, EXPONENT].concat(), true)
            }
            ECC => {
                let key = PublicKey::from_raw(Algorithm::EcdsaP256, &point(&mut reader)?)?;
                (key.to_spki_der(), false)
            }
            _ => {
                return Err(PublicError::Kind(
                    "the key is neither one of RSA nor of ECC",
                ));
            }
        };
        reader.end()?;
        Ok(Self { spki, is_rsa })
    }

    /// DER of its `SubjectPublicKeyInfo`, as in its certificate.
    pub fn spki_der(&self) -> &[u8] {
        &self.spki
    }

    /// Whether it is of RSA with 2048 bits; else it is a point on P-256.
    pub fn is_rsa(&self) -> bool {
        self.is_rsa
    }

    /// SHA-256 over [`EndorsementKey::spki_der`]: what an operator compares.
    pub fn fingerprint(&self) -> Sha256 {
        Sha256::of(&self.spki)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Sign;
    use crate::keys::tests::P256 as Pair;

    fn sized(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat()
    }

    /// What a TPM would write of an attestation key.
    pub(crate) fn attestation(key: &PublicKey) -> Vec<u8> {
        let spki = key.to_spki_der();
        let (x, y) = spki[spki.len() - 64..].split_at(32);
        let head = b"\0\x23\0\x0b\0\x05\0\x72\0\0\0\x10\0\x18\0\x0b\0\x03\0\x10";
        [&head[..], &sized(x), &sized(y)].concat()
    }

    /// What a TPM would write of an endorsement key.
    pub(crate) fn endorsement_rsa() -> Vec<u8> {
        let head = b"\0\x01\0\x0b\0\x03\0\xb2";
        let rest = b"\0\x06\0\x80\0\x43\0\x10\x08\0\0\0\0\0";
        [&head[..], &sized(&[0x83; 32]), rest, &sized(&[0xc1; 256])].concat()
    }

    fn endorsement_ecc() -> Vec<u8> {
        let spki = Pair::new().public_key().to_spki_der();
        let (x, y) = spki[spki.len() - 64..].split_at(32);
        let head = b"\0\x23\0\x0b\0\x03\0\xb2";
        let rest = b"\0\x06\0\x80\0\x43\0\x10\0\x03\0\x10";
        [&head[..], &sized(&[0x83; 32]), rest, &sized(x), &sized(y)].concat()
    }

    #[test]
    fn keys_by_the_templates_are_read() {
        let key = Pair::new().public_key();
        let public = attestation(&key);
        let read = AttestationKey::read(&public).unwrap();
        assert_eq!(read.key, key);
        assert_eq!(read.name[..2], [0, 0x0b]);
        assert_eq!(read.name[2..], Sha256::of(&public).0);
        let rsa = EndorsementKey::read(&endorsement_rsa()).unwrap();
        assert!(rsa.is_rsa() && rsa.spki_der().len() == 294);
        assert!(!EndorsementKey::read(&endorsement_ecc()).unwrap().is_rsa());
    }

    #[test]
    fn a_key_that_is_not_bound_or_not_restricted_is_refused() {
        let public = attestation(&Pair::new().public_key());
        let with = |attributes: u32| {
            let mut odd = public.clone();
            odd[4..8].copy_from_slice(&attributes.to_be_bytes());
            AttestationKey::read(&odd).unwrap_err()
        };
        for bit in [1, 4, 5] {
            assert_eq!(with(0x0005_0072 & !(1 << bit)), PublicError::NotBound);
        }
        let other = PublicError::Use("signing what its TPM makes");
        // Unrestricted, for decryption too, and not for signing.
        for attributes in [0x0004_0072, 0x0007_0072, 0x0003_0072] {
            assert_eq!(with(attributes), other);
        }
        let ek = EndorsementKey::read(&public).unwrap_err();
        assert_eq!(ek, PublicError::Use("decrypting for its TPM"));
        let ak = AttestationKey::read(&endorsement_rsa()).unwrap_err();
        assert_eq!(ak, other);
    }

    #[test]
    fn another_kind_of_key_is_refused() {
        let public = attestation(&Pair::new().public_key());
        let with = |at: usize, byte: u8| {
            let mut odd = public.clone();
            odd[at] = byte;
            AttestationKey::read(&odd)
        };
        // Name by SHA-1, kind, scheme, hash, curve, key derivation.
        for (at, byte) in [(3, 4), (1, 1), (13, 0x1a), (15, 0x0c), (17, 4), (19, 0x20)] {
            assert!(matches!(with(at, byte), Err(PublicError::Kind(_))), "{at}");
        }
        assert!(matches!(with(30, public[30] ^ 1), Err(PublicError::Key(_))));
        let mut small = endorsement_rsa();
        let at = small.len() - 256;
        small[at] = 0x7f;
        assert!(matches!(
            EndorsementKey::read(&small),
            Err(PublicError::Kind(_))
        ));
        let long = EndorsementKey::read(&[0; PUBLIC_MAX + 1]);
        assert_eq!(long, Err(PublicError::TooLong(PUBLIC_MAX + 1)));
    }

    proptest! {
        #[test]
        fn a_cut_public_area_is_none(at in any::<prop::sample::Index>()) {
            for whole in [endorsement_rsa(), endorsement_ecc()] {
                prop_assert!(EndorsementKey::read(&whole[..at.index(whole.len())]).is_err());
            }
            let whole = attestation(&Pair::new().public_key());
            prop_assert!(AttestationKey::read(&whole[..at.index(whole.len())]).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = (AttestationKey::read(&bytes), EndorsementKey::read(&bytes));
        }
    }
}
