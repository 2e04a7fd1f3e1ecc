//! What is done on the thread that talks to the TPM.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, digest};
use tss_esapi::Context;
use tss_esapi::abstraction::{AsymmetricAlgorithmSelection, DefaultKey, ek};
use tss_esapi::attributes::{ObjectAttributesBuilder, SessionAttributesBuilder};
use tss_esapi::constants::SessionType;
use tss_esapi::handles::{AuthHandle, KeyHandle, ObjectHandle, SessionHandle};
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{
    AttestInfo, Data, Digest, EccPoint, EccScheme, EncryptedSecret, HashScheme, IdObject,
    KeyDerivationFunctionScheme, KeyedHashScheme, PcrSelectionList, PcrSelectionListBuilder,
    PcrSlot, Private, Public, PublicBuilder, PublicEccParametersBuilder, PublicKeyedHashParameters,
    SensitiveData, SignatureScheme, SymmetricDefinition, SymmetricDefinitionObject,
};
use tss_esapi::tcti_ldr::TctiNameConf;
use tss_esapi::traits::{Marshall, UnMarshall};

use crate::sys::session::keep_descriptors;

use super::{Endorsement, EndorsementKind, KeyBlob, Quoted, Sealed, TpmError};

/// A TPM that serves one program at a time is let go of after so long without a question.
const IDLE: Duration = Duration::from_secs(2);
/// A question that takes longer than this counts as hanging: others are not made to wait behind it.
const HANGS: Duration = super::QUICK;
/// Longest wait for the thread to unload what it has loaded.
const ENDS: Duration = Duration::from_secs(2);
/// How often a quote is tried while registers change.
const QUOTES: usize = 3;
/// Registers whose values one answer has.
const ROUNDS: usize = 24;

type Job = Box<dyn FnOnce(&mut Worker) + Send>;

/// Questions to the thread.
pub(super) struct Queue {
    jobs: Mutex<Option<Sender<Job>>>,
    /// Ends with the thread.
    ended: Mutex<Receiver<()>>,
    /// Since when the thread has been at the question that it is at.
    busy: Arc<Mutex<Option<(Instant, &'static str)>>>,
}

/// What the thread has.
pub(super) struct Worker {
    name: String,
    conf: TctiNameConf,
    is_shared: bool,
    open: Option<Open>,
}

/// A connection to the TPM, with what was loaded into it.
pub(super) struct Open {
    context: Context,
    /// The storage key, below which all others lie. It is made anew from the TPM's own seed.
    storage: KeyHandle,
    loaded: Option<(KeyBlob, KeyHandle)>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    pub(super) fn start(mut worker: Worker) -> Result<Self, TpmError> {
        let (jobs, receiver) = channel::<Job>();
        let (running, ended) = channel::<()>();
        let busy = Arc::new(Mutex::new(None));
        let state = Arc::clone(&busy);
        let run = move || {
            loop {
                match receiver.recv_timeout(IDLE) {
                    Ok(job) => {
                        job(&mut worker);
                        *lock(&state) = None;
                    }
                    Err(RecvTimeoutError::Timeout) if worker.is_shared => {}
                    Err(RecvTimeoutError::Timeout) => worker.open = None,
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            // What was loaded is unloaded before we are said to have ended.
            drop(worker);
            drop(running);
        };
        thread::Builder::new()
            .name("tpm".to_owned())
            .spawn(run)
            .map_err(|_| TpmError::Thread)?;
        Ok(Self {
            jobs: Mutex::new(Some(jobs)),
            ended: Mutex::new(ended),
            busy,
        })
    }

    /// Has something done. A job whose asker has gone is done all the same, so it must do no harm twice.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        action: &'static str,
        deadline: Duration,
        work: impl Fn(&mut Open) -> Result<T, TpmError> + Send + 'static,
    ) -> Result<T, TpmError> {
        if let Some((since, action)) = *lock(&self.busy)
            && since.elapsed() > HANGS
        {
            let deadline = HANGS;
            return Err(TpmError::Timeout { action, deadline });
        }
        let (sender, answer) = channel();
        let busy = Arc::clone(&self.busy);
        let job = move |worker: &mut Worker| {
            *lock(&busy) = Some((Instant::now(), action));
            let _ = sender.send(worker.attempt(&work));
        };
        let sent = lock(&self.jobs)
            .as_ref()
            .map(|jobs| jobs.send(Box::new(job)));
        sent.and_then(Result::ok).ok_or(TpmError::Thread)?;
        match answer.recv_timeout(deadline) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(TpmError::Timeout { action, deadline }),
            Err(RecvTimeoutError::Disconnected) => Err(TpmError::Thread),
        }
    }
}

impl Drop for Queue {
    /// A TPM without a resource manager would keep what a program that has ended had loaded.
    fn drop(&mut self) {
        *lock(&self.jobs) = None;
        let _ = lock(&self.ended).recv_timeout(ENDS);
    }
}

/// An error of the library.
fn refused(action: &'static str) -> impl FnOnce(tss_esapi::Error) -> TpmError {
    move |error| TpmError::Refused {
        action,
        problem: error.to_string(),
    }
}

impl Worker {
    pub(super) fn new(name: &str) -> Result<Self, TpmError> {
        let unknown = || TpmError::Name(name.chars().take(200).collect());
        // Only these: another would load a library that the name chooses.
        let is_device = name.starts_with("device:");
        if !is_device && !name.starts_with("swtpm:") {
            return Err(unknown());
        }
        Ok(Self {
            name: name.to_owned(),
            conf: TctiNameConf::from_str(name).map_err(|_| unknown())?,
            is_shared: is_device,
            open: None,
        })
    }

    /// Does something; once more over a new connection if the one there was has gone stale.
    fn attempt<T>(
        &mut self,
        work: &dyn Fn(&mut Open) -> Result<T, TpmError>,
    ) -> Result<T, TpmError> {
        if let Some(open) = &mut self.open {
            match work(open) {
                Err(TpmError::Refused { .. }) => self.open = None,
                result => return result,
            }
        }
        let open = self.open.insert(Open::new(&self.name, &self.conf)?);
        let result = work(open);
        if matches!(result, Err(TpmError::Refused { .. })) {
            self.open = None;
        }
        result
    }
}

/// Fixed to this TPM and made by it.
fn bound() -> ObjectAttributesBuilder {
    ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_restricted(true)
}

fn ecc(
    attributes: ObjectAttributesBuilder,
    symmetric: SymmetricDefinitionObject,
    scheme: EccScheme,
) -> tss_esapi::Result<Public> {
    let attributes = attributes.build()?;
    let parameters = PublicEccParametersBuilder::new()
        .with_symmetric(symmetric)
        .with_ecc_scheme(scheme)
        .with_curve(EccCurve::NistP256)
        .with_key_derivation_function_scheme(KeyDerivationFunctionScheme::Null)
        .with_is_signing_key(attributes.sign_encrypt())
        .with_is_decryption_key(attributes.decrypt())
        .with_restricted(attributes.restricted())
        .build()?;
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_ecc_parameters(parameters)
        .with_ecc_unique_identifier(EccPoint::default())
        .build()
}

fn storage_template() -> tss_esapi::Result<Public> {
    let attributes = bound().with_no_da(true).with_decrypt(true);
    let cipher = SymmetricDefinitionObject::AES_128_CFB;
    ecc(attributes, cipher, EccScheme::Null)
}

fn attestation_template() -> tss_esapi::Result<Public> {
    let attributes = bound().with_no_da(true).with_sign_encrypt(true);
    let scheme = EccScheme::EcDsa(HashScheme::new(HashingAlgorithm::Sha256));
    ecc(attributes, SymmetricDefinitionObject::Null, scheme)
}

fn selection(pcrs: u32) -> tss_esapi::Result<PcrSelectionList> {
    let slots: Vec<PcrSlot> = (0..24)
        .filter(|register| pcrs >> register & 1 == 1)
        .filter_map(|register| PcrSlot::try_from(1_u32 << register).ok())
        .collect();
    PcrSelectionListBuilder::new()
        .with_selection(HashingAlgorithm::Sha256, &slots)
        .build()
}

/// What `TPM2_PolicyPCR` and a quote have: the digest over the values.
fn digest_of(registers: &BTreeMap<u8, [u8; 32]>) -> Vec<u8> {
    let values: Vec<u8> = registers.values().flatten().copied().collect();
    digest(&SHA256, &values).as_ref().to_vec()
}

impl Open {
    fn new(name: &str, conf: &TctiNameConf) -> Result<Self, TpmError> {
        let unreachable = |error: tss_esapi::Error| TpmError::Unreachable {
            name: name.to_owned(),
            problem: error.to_string(),
        };
        let mut context = Context::new(conf.clone()).map_err(unreachable)?;
        // Else a QEMU that is started just now would hold the connection, and with it the TPM.
        keep_descriptors();
        // Nothing of ours has a password; what protects it is that it can't leave the TPM.
        context.set_sessions((Some(AuthSession::Password), None, None));
        let storage = storage_template()
            .and_then(|public| {
                context.create_primary(Hierarchy::Owner, public, None, None, None, None)
            })
            .map_err(unreachable)?;
        Ok(Self {
            context,
            storage: storage.key_handle,
            loaded: None,
        })
    }

    pub(super) fn make_attestation_key(&mut self) -> Result<KeyBlob, TpmError> {
        self.make(None, attestation_template())
            .map_err(refused("making the attestation key"))
    }

    fn make(
        &mut self,
        secret: Option<SensitiveData>,
        template: tss_esapi::Result<Public>,
    ) -> tss_esapi::Result<KeyBlob> {
        let made = self
            .context
            .create(self.storage, template?, None, secret, None, None)?;
        Ok(KeyBlob {
            private: made.out_private.value().to_vec(),
            public: made.out_public.marshall()?,
        })
    }

    /// Loads something that this TPM made.
    fn insert(&mut self, blob: &KeyBlob) -> Result<KeyHandle, TpmError> {
        let foreign = |error: tss_esapi::Error| TpmError::Foreign(error.to_string());
        let private = Private::try_from(blob.private.clone()).map_err(foreign)?;
        let public = Public::unmarshall(&blob.public).map_err(foreign)?;
        let loaded = self.context.load(self.storage, private, public);
        // Where the connection is gone as well, asking for it again says so.
        loaded.map_err(|error| {
            match self
                .context
                .execute_without_session(|context| context.get_random(8))
            {
                Ok(_) => TpmError::Foreign(error.to_string()),
                Err(error) => refused("loading a key")(error),
            }
        })
    }

    pub(super) fn load(&mut self, key: &KeyBlob) -> Result<KeyHandle, TpmError> {
        if let Some((blob, handle)) = &self.loaded {
            if blob == key {
                return Ok(*handle);
            }
            let handle = ObjectHandle::from(*handle);
            self.loaded = None;
            let flushed = self.context.flush_context(handle);
            flushed.map_err(refused("unloading a key"))?;
        }
        let handle = self.insert(key)?;
        self.loaded = Some((key.clone(), handle));
        Ok(handle)
    }

    pub(super) fn registers(&mut self, pcrs: u32) -> Result<BTreeMap<u8, [u8; 32]>, TpmError> {
        let action = "reading the registers";
        let odd = |problem: &str| TpmError::Refused {
            action,
            problem: problem.to_owned(),
        };
        let mut registers = BTreeMap::new();
        // A TPM tells some at a time.
        for _ in 0..ROUNDS {
            let left = (0..24_u8)
                .filter(|register| pcrs >> register & 1 == 1 && !registers.contains_key(register));
            let left = left.fold(0_u32, |left, register| left | 1 << register);
            if left == 0 {
                return Ok(registers);
            }
            let (_, told, values) = selection(left)
                .and_then(|list| {
                    self.context
                        .execute_without_session(|context| context.pcr_read(list))
                })
                .map_err(refused(action))?;
            let slots: Vec<u32> = told
                .get_selections()
                .iter()
                .flat_map(|bank| bank.selected())
                .map(u32::from)
                .collect();
            let told = (0..24_u8).filter(|register| slots.contains(&(1 << register)));
            let before = registers.len();
            for (register, value) in told.zip(values.value()) {
                let value = <[u8; 32]>::try_from(value.value())
                    .map_err(|_| odd("a register has another length"))?;
                registers.insert(register, value);
            }
            if registers.len() == before {
                return Err(odd("the TPM has no such registers in its SHA-256 bank"));
            }
        }
        Err(odd("the TPM does not tell all registers"))
    }

    pub(super) fn quote(
        &mut self,
        key: &KeyBlob,
        pcrs: u32,
        qualifying: &[u8],
    ) -> Result<Quoted, TpmError> {
        let action = "quoting the registers";
        let handle = self.load(key)?;
        for _ in 0..QUOTES {
            let registers = self.registers(pcrs)?;
            let data = Data::try_from(qualifying).map_err(refused(action))?;
            let (attest, signature) = selection(pcrs)
                .and_then(|list| {
                    self.context
                        .quote(handle, data, SignatureScheme::Null, list)
                })
                .map_err(refused(action))?;
            let AttestInfo::Quote { info } = attest.attested() else {
                return Err(TpmError::Refused {
                    action,
                    problem: "the TPM made something else than a quote".to_owned(),
                });
            };
            // Something may have been measured in between.
            if info.pcr_digest().value() == digest_of(&registers) {
                return Ok(Quoted {
                    attest: attest.marshall().map_err(refused(action))?,
                    signature: signature.marshall().map_err(refused(action))?,
                    registers,
                });
            }
        }
        Err(TpmError::Restless)
    }

    pub(super) fn endorsement(&mut self, kind: EndorsementKind) -> Result<Endorsement, TpmError> {
        let action = "making the endorsement key";
        let handle = self.endorsement_key(kind).map_err(refused(action))?;
        let public = self
            .context
            .execute_with_temporary_object(handle.into(), |context, _| {
                let (public, ..) =
                    context.execute_without_session(|context| context.read_public(handle))?;
                public.marshall()
            });
        // Most virtual TPMs have none.
        let certificate = self
            .context
            .execute_without_session(|context| ek::retrieve_ek_pubcert(context, algorithm(kind)))
            .ok();
        Ok(Endorsement {
            public: public.map_err(refused(action))?,
            certificate,
        })
    }

    fn endorsement_key(&mut self, kind: EndorsementKind) -> tss_esapi::Result<KeyHandle> {
        // The library opens a session of its own for it.
        self.context.execute_without_session(|context| {
            ek::create_ek_object_2(context, algorithm(kind), DefaultKey)
        })
    }

    pub(super) fn activate(
        &mut self,
        key: &KeyBlob,
        kind: EndorsementKind,
        credential: &[u8],
        secret: &[u8],
    ) -> Result<Vec<u8>, TpmError> {
        let action = "opening the challenge";
        let handle = self.load(key)?;
        let credential =
            IdObject::try_from(credential).map_err(|_| TpmError::Length("the credential"))?;
        let secret =
            EncryptedSecret::try_from(secret).map_err(|_| TpmError::Length("the secret"))?;
        let endorsement = self.endorsement_key(kind).map_err(refused(action))?;
        let opened =
            self.context
                .execute_with_temporary_object(endorsement.into(), |context, _| {
                    let session = policy_session(context, SessionType::Policy, None)?;
                    let handle_of_session = SessionHandle::from(session).into();
                    context.execute_with_temporary_object(handle_of_session, |context, _| {
                        // By the template's policy, whoever may use the endorsement hierarchy may use the key.
                        context.execute_with_session(Some(AuthSession::Password), |context| {
                            context.policy_secret(
                                PolicySession::try_from(session)?,
                                AuthHandle::Endorsement,
                                Default::default(),
                                Default::default(),
                                Default::default(),
                                None,
                            )
                        })?;
                        let sessions = (Some(AuthSession::Password), Some(session), None);
                        context.execute_with_sessions(sessions, |context| {
                            context.activate_credential(handle, endorsement, credential, secret)
                        })
                    })
                });
        let opened = opened.map_err(|error| TpmError::Foreign(error.to_string()))?;
        Ok(opened.value().to_vec())
    }

    /// Digest of the policy that these registers hold what they do now.
    fn policy_digest(
        &mut self,
        pcrs: u32,
        registers: &BTreeMap<u8, [u8; 32]>,
    ) -> tss_esapi::Result<Digest> {
        let session = policy_session(&mut self.context, SessionType::Trial, None)?;
        let handle = SessionHandle::from(session).into();
        self.context
            .execute_with_temporary_object(handle, |context, _| {
                context.execute_without_session(|context| {
                    let policy = PolicySession::try_from(session)?;
                    let values = Digest::try_from(digest_of(registers))?;
                    context.policy_pcr(policy, values, selection(pcrs)?)?;
                    context.policy_get_digest(policy)
                })
            })
    }

    pub(super) fn seal(&mut self, pcrs: u32, secret: &[u8]) -> Result<Sealed, TpmError> {
        let registers = self.registers(pcrs)?;
        let template = self.policy_digest(pcrs, &registers).and_then(|policy| {
            // Only by that policy, never with a password.
            let attributes = ObjectAttributesBuilder::new()
                .with_fixed_tpm(true)
                .with_fixed_parent(true)
                .with_no_da(true)
                .build()?;
            PublicBuilder::new()
                .with_public_algorithm(PublicAlgorithm::KeyedHash)
                .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
                .with_object_attributes(attributes)
                .with_auth_policy(policy)
                .with_keyed_hash_parameters(PublicKeyedHashParameters::new(KeyedHashScheme::Null))
                .with_keyed_hash_unique_identifier(Digest::default())
                .build()
        });
        let blob = SensitiveData::try_from(secret)
            .and_then(|secret| self.make(Some(secret), template))
            .map_err(refused("sealing a secret"))?;
        Ok(Sealed { blob, registers })
    }

    pub(super) fn unseal(&mut self, sealed: &Sealed) -> Result<Vec<u8>, TpmError> {
        let action = "unsealing a secret";
        let pcrs = sealed.registers.keys().filter(|register| **register < 24);
        let pcrs = pcrs.fold(0_u32, |pcrs, register| pcrs | 1 << register);
        super::check_pcrs(pcrs)?;
        let item = self.insert(&sealed.blob)?;
        let storage = self.storage;
        let unsealed = self
            .context
            .execute_with_temporary_object(item.into(), |context, _| {
                // The session is salted and encrypts, so that who listens at the TPM's pins does not learn the secret.
                let session = context.execute_without_session(|context| {
                    policy_session(context, SessionType::Policy, Some(storage))
                })?;
                let handle = SessionHandle::from(session).into();
                context.execute_with_temporary_object(handle, |context, _| {
                    context.execute_without_session(|context| {
                        let policy = PolicySession::try_from(session)?;
                        context.policy_pcr(policy, Digest::default(), selection(pcrs)?)
                    })?;
                    context
                        .execute_with_session(Some(session), |context| context.unseal(item.into()))
                })
            });
        let error = match unsealed {
            Ok(secret) => return Ok(secret.value().to_vec()),
            Err(error) => error,
        };
        // A wrong policy digest is all that the TPM says; the registers say why.
        let now = self.registers(pcrs)?;
        let changed: Vec<u8> = sealed
            .registers
            .iter()
            .filter(|(register, value)| now.get(register) != Some(value))
            .map(|(register, _)| *register)
            .collect();
        if changed.is_empty() {
            return Err(refused(action)(error));
        }
        Err(TpmError::Changed(changed))
    }
}

fn algorithm(kind: EndorsementKind) -> AsymmetricAlgorithmSelection {
    match kind {
        EndorsementKind::Rsa2048 => AsymmetricAlgorithmSelection::Rsa(RsaKeyBits::Rsa2048),
        EndorsementKind::EccP256 => AsymmetricAlgorithmSelection::Ecc(EccCurve::NistP256),
    }
}

/// A session for a policy. With a key, it is salted for it, and what it gives out is encrypted.
fn policy_session(
    context: &mut Context,
    kind: SessionType,
    key: Option<KeyHandle>,
) -> tss_esapi::Result<AuthSession> {
    let (cipher, hash) = (SymmetricDefinition::AES_128_CFB, HashingAlgorithm::Sha256);
    let session = context.execute_without_session(|context| {
        context.start_auth_session(key, None, None, kind, cipher, hash)
    })?;
    let none = tss_esapi::WrapperErrorKind::WrongValueFromTpm;
    let session = session.ok_or(tss_esapi::Error::WrapperError(none))?;
    if key.is_some() {
        let (attributes, mask) = SessionAttributesBuilder::new().with_encrypt(true).build();
        context.tr_sess_set_attributes(session, attributes, mask)?;
    }
    Ok(session)
}
