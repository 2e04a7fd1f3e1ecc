//! Errors as they are told at the command line: kind, cause, hint.

use std::process::ExitCode;

use palanquin_api::config::LoadError;
use palanquin_api::control::{ApiError, ErrorKind};

use crate::{output, render};

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

    /// With all that is wrong with a file.
    #[must_use]
    pub(crate) fn load_error(self, error: LoadError) -> Self {
        match error {
            LoadError::Rules(found) => found.into_iter().fold(self, Self::cause),
            other => self.cause(other),
        }
    }

    /// Tells it on standard error, as text or as one JSON object, and gives the exit status.
    pub(crate) fn tell(&self, json: bool) -> ExitCode {
        self.show(json);
        ExitCode::from(self.0.kind.exit_status())
    }

    /// Tells it on standard error.
    pub(crate) fn show(&self, json: bool) {
        if json {
            output::note(&output::to_json(&self.0));
        } else {
            output::note(&self.text());
        }
    }

    fn text(&self) -> String {
        let error = &self.0;
        let mut text = vec![format!("error: {}", output::lines(&error.message, "  "))];
        for cause in &error.causes {
            text.push(format!("  cause: {}", output::lines(cause, "         ")));
        }
        for blocker in &error.blockers {
            text.push(format!("  blocker: {}", render::blocker(blocker)));
            text.push(format!("    remedy: {}", output::line(&blocker.remedy)));
        }
        if let Some(hint) = &error.hint {
            text.push(format!("  hint: {}", output::line(hint)));
        }
        text.join("\n")
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

#[cfg(test)]
mod tests {
    use palanquin_api::control::{Blocker, Side};

    use super::*;

    #[test]
    fn an_error_is_told_with_its_cause_its_blockers_and_what_to_do() {
        let mut failure = Failure::new(ErrorKind::Blocked, "VM \"web\" can't be migrated")
            .cause("because\nof this")
            .hint("do this");
        failure.0.blockers.push(Blocker {
            side: Side::Destination,
            gate: None,
            code: "memory-short".to_owned(),
            message: "too little memory".to_owned(),
            remedy: "Add some.".to_owned(),
        });
        assert_eq!(
            failure.text(),
            "error: VM \"web\" can't be migrated\n  cause: because\n         of this\n  blocker: too \
             little memory (destination, memory-short)\n    remedy: Add some.\n  hint: do this"
        );
        assert_eq!(failure.0.kind.exit_status(), 4);
    }
}
