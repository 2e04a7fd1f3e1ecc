//! Errors as they are told at the command line: kind, cause, hint.

use std::process::ExitCode;

use palanquin_api::control::{ApiError, ErrorKind, Side};

/// A command that failed.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) ApiError);

impl Failure {
    /// With a kind and a sentence.
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let (causes, blockers) = (Vec::new(), Vec::new());
        Self(ApiError {
            kind,
            message: message.into(),
            causes,
            hint: None,
            blockers,
        })
    }

    /// A request that makes no sense.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    /// With what to do about it.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// With why it happened.
    #[must_use]
    pub(crate) fn cause(mut self, cause: impl std::fmt::Display) -> Self {
        self.0.causes.push(cause.to_string());
        self
    }

    /// Tells it on standard error, as text or as one JSON object, and gives the exit status.
    pub(crate) fn tell(&self, json: bool) -> ExitCode {
        if json {
            // These types always serialize.
            eprintln!("{}", serde_json::to_string(&self.0).unwrap_or_default());
        } else {
            eprint!("{}", self.text());
        }
        ExitCode::from(self.0.kind.exit_status())
    }

    fn text(&self) -> String {
        let mut text = format!("error: {}\n", self.0.message);
        for cause in &self.0.causes {
            text += &format!("  cause: {cause}\n");
        }
        for blocker in &self.0.blockers {
            let side = match blocker.side {
                Side::Source => "source",
                Side::Destination => "destination",
            };
            text += &format!(
                "  blocker: {} ({side}, {})\n",
                blocker.message, blocker.code
            );
            text += &format!("    remedy: {}\n", blocker.remedy);
        }
        if let Some(hint) = &self.0.hint {
            text += &format!("  hint: {hint}\n");
        }
        text
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

#[cfg(test)]
mod tests {
    use palanquin_api::control::Blocker;

    use super::*;

    #[test]
    fn an_error_is_told_with_its_cause_its_blockers_and_what_to_do() {
        let mut failure = Failure::new(ErrorKind::Blocked, "VM \"web\" can't be migrated")
            .cause("because")
            .hint("do this");
        failure.0.blockers.push(Blocker {
            side: Side::Destination,
            code: "memory-short".to_owned(),
            message: "too little memory".to_owned(),
            remedy: "Add some.".to_owned(),
        });
        assert_eq!(
            failure.text(),
            "error: VM \"web\" can't be migrated\n  cause: because\n  blocker: too little memory \
             (destination, memory-short)\n    remedy: Add some.\n  hint: do this\n"
        );
        assert_eq!(failure.0.kind.exit_status(), 4);
    }
}
