//! What watching from outside and from inside have in common.

use palanquin_api::control::ErrorKind;
use palanquin_host::probe::ProbeError;

use crate::failure::Failure;

/// The time of day.
pub(super) fn clock_text(time_s: f64) -> String {
    let time = time::OffsetDateTime::from_unix_timestamp(time_s as i64);
    time.map_or_else(
        |_| format!("{time_s:.0} s"),
        |time| {
            let (date, h, m, s) = (time.date(), time.hour(), time.minute(), time.second());
            format!("{date} {h:02}:{m:02}:{s:02}Z")
        },
    )
}

/// Completes when the operator or the system ends us.
pub(super) async fn ended() {
    let terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate());
    let Ok(mut terminate) = terminate else {
        let _ = tokio::signal::ctrl_c().await;
        return;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

/// Why no probes can be sent, and what to do about it.
pub(super) fn refused(error: &ProbeError) -> Failure {
    let is_interface = matches!(
        error,
        ProbeError::Interface { .. } | ProbeError::InterfaceName(_) | ProbeError::NotEthernet(_)
    );
    let kind = match error {
        _ if error.is_right() => ErrorKind::Blocked,
        _ if is_interface => ErrorKind::Usage,
        _ => ErrorKind::Internal,
    };
    let failure = Failure::new(kind, "no probes can be sent").cause(error);
    match error {
        ProbeError::EchoRight { .. } => failure.hint(
            "run it as root, or `setcap cap_net_raw+ep` the program, or set net.ipv4.ping_group_range",
        ),
        ProbeError::Interface { source, .. } => failure.cause(source).hint(
            "`ip -br link` lists interfaces; a port of a bridge hears nothing, the bridge does",
        ),
        ProbeError::NotEthernet(_) | ProbeError::InterfaceName(_) => {
            failure.hint("`ip -br link` lists interfaces")
        }
        ProbeError::Socket { source, .. } => failure.cause(source),
        _ => failure,
    }
}
