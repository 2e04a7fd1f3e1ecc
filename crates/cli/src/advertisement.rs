//! `palanquin advertisement`: what hosts promise each other.

use std::path::Path;

use palanquin_api::advertisement::{
    AcceptAdvertisement, AdvertisementInfo, Advertisements, MadeAdvertisement, MakeAdvertisement,
    PardonHost, QuarantineInfo,
};
use palanquin_api::hex::Hex;
use palanquin_trust::advertisement::{PARCEL_MAX, Parcel};
use palanquin_trust::passport::date;
use palanquin_trust::{Advertisement, Signed};
use serde_json::{Value, json};

use crate::arguments::AdvertisementCommand;
use crate::client::Client;
use crate::commands::show;
use crate::failure::Failure;
use crate::files::{NewFiles, read};
use crate::output::line;
use crate::render;

/// Does what was typed.
pub(crate) async fn run(
    client: &Client,
    command: &AdvertisementCommand,
    json: bool,
) -> Result<(), Failure> {
    match command {
        AdvertisementCommand::Make {
            audience,
            memory,
            hold,
            out,
        } => {
            let request = MakeAdvertisement {
                audience: audience.clone(),
                memory_bytes: memory.map(|memory| memory.bytes()),
                lifetime_s: hold.as_millis() / 1000,
            };
            make(client, &request, out, json).await
        }
        AdvertisementCommand::Show { file } => peek(file, json),
        AdvertisementCommand::Accept { file } => {
            let parcel = Hex(read(file, PARCEL_MAX)?);
            let request = AcceptAdvertisement { parcel };
            let said: AdvertisementInfo =
                client.post("/v1/advertisements/accept", &request).await?;
            show(&said, |said| told(said) + "\nAccepted.\n", json)
        }
        AdvertisementCommand::Ls => {
            let all: Advertisements = client.get("/v1/advertisements").await?;
            show(&all, list, json)
        }
        AdvertisementCommand::Pardon { host } => {
            let request = PardonHost { host: host.clone() };
            let was: QuarantineInfo = client.post("/v1/advertisements/pardon", &request).await?;
            let text = |was: &QuarantineInfo| {
                let message = line(&format!("It was: {}", was.message));
                format!(
                    "{} is not in quarantine any more. {message}\n",
                    line(&was.host)
                )
            };
            show(&was, text, json)
        }
    }
}

async fn make(
    client: &Client,
    request: &MakeAdvertisement,
    out: &Path,
    json: bool,
) -> Result<(), Failure> {
    let mut files = NewFiles::default();
    // Before anything is promised: what can't be carried must not be held.
    files.write(out, [], 0o644)?;
    let made: MadeAdvertisement = client.post("/v1/advertisements", request).await?;
    std::fs::write(out, &made.parcel.0)
        .map_err(|error| crate::files::failed(&format!("cannot write {}", out.display()), error))?;
    files.keep();
    let text = |says: &AdvertisementInfo| {
        let end = format!(
            "Wrote it to {}: carry that to the host that it is for.",
            out.display()
        );
        format!("{}\n{}\n", told(says), line(&end))
    };
    show(&made.says, text, json)
}

fn peek(file: &Path, json: bool) -> Result<(), Failure> {
    let none = || Failure::usage(format!("{} is no advertisement", file.display()));
    let parcel = Parcel::from_bytes(&read(file, PARCEL_MAX)?);
    let parcel = parcel.map_err(|error| none().cause(error))?;
    let signed = Signed::<Advertisement>::from_bytes(&parcel.envelope);
    let signed = signed.map_err(|error| none().cause(error))?;
    let shown = signed.peek().map_err(|error| none().cause(error))?;
    let value = json!({
        "verified": false,
        "sha256": signed.sha256(),
        "key_id": signed.key_id(),
        "certificates": parcel.certificates.len(),
        "advertisement": shown,
    });
    let text = |_: &Value| {
        let lines: Vec<_> = shown.to_string().lines().map(line).collect();
        let (lines, key) = (lines.join("\n"), signed.key_id());
        format!(
            "{lines}\nsigned by    {key}\n\nNobody has checked the signature: the host that accepts it does.\n"
        )
    };
    show(&value, text, json)
}

fn told(says: &AdvertisementInfo) -> String {
    let (free, left) = (says.memory_free_bytes, says.memory_left_bytes);
    let lines = [
        format!("{} promises to {}", says.host, says.audience),
        format!(
            "memory       {} of {}, {} are left",
            render::bytes(free),
            render::bytes(says.memory_total_bytes),
            render::bytes(left)
        ),
        format!("until        {}", date(says.expires_unix_s)),
        format!("CPU threads  {}", says.cpu_threads),
        format!("hypervisor   {}", says.hypervisor_version),
        format!("sequence     {} ({})", says.sequence, says.sha256),
    ];
    lines.iter().map(|text| line(text) + "\n").collect()
}

fn list(all: &Advertisements) -> String {
    if *all == Advertisements::default() {
        return "Nothing is promised, and no host is in quarantine.\n".to_owned();
    }
    let mut text = String::new();
    let accepted: Vec<Vec<String>> = all
        .accepted
        .iter()
        .map(|says| {
            vec![
                says.host.clone(),
                render::bytes(says.memory_left_bytes),
                render::bytes(says.memory_free_bytes),
                date(says.expires_unix_s),
            ]
        })
        .collect();
    if !accepted.is_empty() {
        text += &render::table(&["PROMISED BY", "LEFT", "OF", "UNTIL"], &accepted);
    }
    let promised: Vec<Vec<String>> = all
        .promised
        .iter()
        .map(|promise| {
            let (left, until) = (promise.left_bytes, promise.expires_unix_s);
            vec![promise.audience.clone(), render::bytes(left), date(until)]
        })
        .collect();
    if !promised.is_empty() {
        text += &render::table(&["PROMISED TO", "HELD", "UNTIL"], &promised);
    }
    let quarantined: Vec<Vec<String>> = all
        .quarantined
        .iter()
        .map(|entry| {
            let (host, message) = (entry.host.clone(), entry.message.clone());
            vec![host, date(entry.since_unix_s), message]
        })
        .collect();
    if !quarantined.is_empty() {
        text += &render::table(&["IN QUARANTINE", "SINCE", "BECAUSE"], &quarantined);
    }
    text
}
