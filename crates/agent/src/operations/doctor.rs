//! What stands in the way of a migration, without one.

use std::time::Duration;

use palanquin_api::control::{Blocker, DoctorReport, DoctorRequest, Side, StartMigration};
use palanquin_engine::Message;
use palanquin_engine::message::{Hello, Offer};
use palanquin_host::facts;

use super::Answer;
use crate::agent::Agent;
use crate::chain::chain;
use crate::challenge;
use crate::dial::dial;
use crate::gate::{Caller, api_blockers, encoded, refusal};
use crate::tracked::api_blocker;

impl Agent {
    /// Looks for everything that stands in the way.
    ///
    /// # Errors
    ///
    /// The VM or host is not known.
    pub fn doctor(&self, request: &DoctorRequest, caller: Caller) -> Answer<DoctorReport> {
        let mut report = DoctorReport::default();
        self.examine_host(&mut report);
        self.examine_confinement(&mut report);
        self.examine_trust(&mut report);
        let mut offer = None;
        if let Some(name) = &request.vm {
            let entry = self.named(name)?;
            let to = request
                .to
                .clone()
                .unwrap_or_else(|| self.config.name.clone());
            match self.offer_of(&entry, &to, None) {
                Ok((_, found, layout)) => {
                    report.passed.push(format!(
                        "VM {name:?} can be followed and described ({} MiB)",
                        layout.total_bytes() >> 20
                    ));
                    offer = Some(found);
                    if request.to.is_some() {
                        self.examine_gates(caller, &mut offer, &mut report);
                    }
                }
                Err(problem) if problem.blockers.is_empty() => report.blockers.push(Blocker {
                    side: Side::Source,
                    gate: None,
                    code: "vm".to_owned(),
                    message: [vec![problem.message], problem.causes].concat().join(": "),
                    remedy: problem
                        .hint
                        .unwrap_or_else(|| "Look at the VM's log.".to_owned()),
                }),
                Err(problem) => report.blockers.extend(problem.blockers),
            }
        }
        if let Some(to) = &request.to {
            self.examine_peer(to, offer, &mut report);
        }
        Ok(report)
    }

    fn examine_host(&self, report: &mut DoctorReport) {
        match self.hypervisor.version() {
            Ok(version) => report.passed.push(format!("QEMU {version}")),
            Err(problem) => report.blockers.push(Blocker {
                side: Side::Source,
                gate: None,
                code: "qemu-missing".to_owned(),
                message: chain(&problem),
                remedy: "Install QEMU, or set `qemu.binary`.".to_owned(),
            }),
        }
        let release = facts::kernel_release();
        let mut parts = release
            .split(['.', '-'])
            .map_while(|part| part.parse::<u32>().ok());
        let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        if version >= (6, 7) {
            report.passed.push(format!("Linux {release}"));
        } else {
            report.blockers.push(Blocker {
                side: Side::Source,
                gate: None,
                code: "kernel".to_owned(),
                message: format!("Linux {release} can't follow writes to memory from outside"),
                remedy: "Linux 6.7 or newer is needed.".to_owned(),
            });
        }
    }

    /// What this host lacks for our processes to be confined.
    pub(super) fn unconfined(&self) -> Vec<String> {
        let network = self.network.lacks();
        let network = network
            .iter()
            .map(|lack| format!("network process: {lack}"));
        network.chain(self.hypervisor.unconfined()).collect()
    }

    fn examine_confinement(&self, report: &mut DoctorReport) {
        let lacks = self.unconfined();
        if lacks.is_empty() {
            let text = "what talks to other hosts, and QEMU, run without privileges";
            report.passed.push(text.to_owned());
        }
        // They stand in nothing's way, but should be known.
        let lacks = lacks.into_iter();
        report
            .passed
            .extend(lacks.map(|lack| format!("warning: not confined as it should be: {lack}")));
    }

    fn examine_trust(&self, report: &mut DoctorReport) {
        report.passed.push(match self.gate.info() {
            Some(trust) => format!(
                "policies of version {} decide ({})",
                trust.policy_version, trust.policy_sha256
            ),
            None => "warning: nothing is judged here: `[trust]` is not configured".to_owned(),
        });
        // They are checked again with every migration: what is told is how the last check ended.
        let quarantined = self.gate.quarantined().into_iter();
        report.passed.extend(quarantined.map(|host| {
            let until = if host.is_false() {
                "somebody pardons it"
            } else {
                "a check passes"
            };
            format!(
                "warning: host {} is in quarantine until {until}: {}",
                host.host, host.message
            )
        }));
    }

    /// Whether the gates of this host let the VM go, and what speaks for it at the other.
    fn examine_gates(&self, caller: Caller, offer: &mut Option<Offer>, report: &mut DoctorReport) {
        let Some(offer) = offer else { return };
        let request = StartMigration::of(&offer.order.vm_name, &offer.order.destination);
        let operator = self.gate.operator(caller);
        let cleared = match operator {
            Ok(operator) => self.clear_out(operator.as_ref(), &offer.order, &request, true),
            Err(reason) => Err(refusal("the migration", &[reason])),
        };
        match cleared {
            Ok(None) => {}
            Ok(Some(clearance)) => {
                let judged = "the gates of this host let the VM go, without approvals";
                report.passed.push(judged.to_owned());
                match encoded(clearance.credentials(), Vec::new()) {
                    Ok(credentials) => offer.credentials = credentials,
                    Err(reason) => {
                        report
                            .blockers
                            .extend(api_blockers(Side::Source, &[reason]));
                    }
                }
            }
            Err(problem) => report.blockers.extend(problem.blockers),
        }
    }

    fn examine_peer(&self, to: &str, offer: Option<Offer>, report: &mut DoctorReport) {
        let mut found = |code: &str, message: String, remedy: &str| {
            report.blockers.push(Blocker {
                side: Side::Destination,
                gate: None,
                code: code.to_owned(),
                message,
                remedy: remedy.to_owned(),
            });
        };
        let channel = match dial(self, to) {
            Ok(channel) => channel,
            Err(reason) => {
                let remedy = "Is its agent running, its address right, and its certificate from the same \
                              authority?";
                return found(&reason.code, reason.message, remedy);
            }
        };
        channel.set_receive_timeout(Some(Duration::from_secs(20)));
        let converse = || {
            let hello = Hello::ours(crate::SOFTWARE, challenge::fresh()?);
            channel.send(&Message::Hello(hello))?;
            let greeting = channel.receive()?;
            let Some(offer) = offer else {
                return Ok((greeting, None));
            };
            channel.send(&Message::Check(offer))?;
            let reply = channel.receive()?;
            Ok::<_, crate::channel::ChannelError>((greeting, Some(reply)))
        };
        let answer = converse();
        match answer {
            Err(problem) => {
                let remedy = "Look at the log of the destination's agent: it names why it refuses.";
                found("refused", chain(&problem), remedy);
            }
            Ok((Message::HelloReply(reply), _)) if reply.version.is_none() => {
                let message = format!("no common version of the protocol with {}", reply.software);
                found(
                    "protocol-version",
                    message,
                    "Upgrade the older of the two agents.",
                );
            }
            Ok((_, reply)) => {
                report.passed.push(format!(
                    "host {to:?} answers ({}, {})",
                    channel.cipher, channel.key_exchange
                ));
                match reply {
                    Some(Message::CheckReply(blockers)) if blockers.is_empty() => {
                        report.passed.push(format!("host {to:?} would take the VM"));
                    }
                    Some(Message::CheckReply(blockers)) => {
                        report.blockers.extend(blockers.iter().map(api_blocker));
                    }
                    _ => {}
                }
            }
        }
        channel.close();
    }
}
