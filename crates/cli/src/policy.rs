//! `palanquin policy`: a provider's policies, offline.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use palanquin_trust::passport::date;
use palanquin_trust::policy::{
    Explanation, FILE_MAX, Policies, Rehearsal, SCHEMA, Trace, rehearsals,
};
use palanquin_trust::{Decision, Sha256};
use palanquin_trust_files::{self as files, FilesError};
use serde::Serialize;
use serde_json::{Value, json};

use crate::arguments::{ExplainArgs, PolicyCommand};
use crate::commands::show;
use crate::failure::Failure;
use crate::files::read_text;
use crate::output::{line, say};
use crate::passport;

/// Longest `tests.toml`.
const LONG_FILE_MAX: usize = 16 * FILE_MAX;
/// Most passports that tests use.
const PASSPORTS_MAX: usize = 1000;

/// Does what was typed.
pub(crate) fn run(command: &PolicyCommand, json: bool) -> Result<(), Failure> {
    match command {
        PolicyCommand::Check { dir } => {
            let policies = load(dir)?;
            let checked = json!({
                "dir": dir.display().to_string(),
                "good": true,
                "policies": policies.names(),
                "version": policies.directory().version,
                "sha256": policies.sha256(),
            });
            let text = |_: &Value| {
                let (dir, count) = (dir.display(), policies.names().len());
                let version = policies.directory().version;
                format!(
                    "{dir} is good: {count} policies, directory version {version}.\n{}\n",
                    policies.sha256()
                )
            };
            show(&checked, text, json)
        }
        PolicyCommand::Test { dir } => test(dir, json),
        PolicyCommand::Explain(arguments) => explain(arguments, json),
        PolicyCommand::Schema => say(SCHEMA),
    }
}

/// Digest of the policies of a directory, if they are good.
pub(crate) fn digest(dir: &Path) -> Result<Sha256, Failure> {
    Ok(load(dir)?.sha256())
}

fn load(dir: &Path) -> Result<Policies, Failure> {
    files::policies(dir).map_err(|error| match error {
        FilesError::NoPolicies(_) => Failure::usage(error.to_string())
            .hint("policies are files *.cedar; docs/policy.md begins one"),
        FilesError::Policies(dir, error) => {
            let what = format!("the policies in {} can't be used", dir.display());
            let failure = Failure::usage(what)
                .hint("`palanquin policy schema` prints what policies may speak of");
            error.0.into_iter().fold(failure, Failure::cause)
        }
        error => unreadable(error),
    })
}

fn unreadable(error: FilesError) -> Failure {
    match error {
        FilesError::Read { path, error } => {
            Failure::usage(format!("cannot read {}", path.display())).cause(error)
        }
        error => Failure::usage(error.to_string()),
    }
}

fn cases(dir: &Path, file: &Path) -> Result<Vec<Rehearsal>, Failure> {
    let passports = dir.join("passports");
    let passports = if passports.exists() {
        files::texts(&passports, ".toml", PASSPORTS_MAX).map_err(unreadable)?
    } else {
        BTreeMap::new()
    };
    rehearsals(&read_text(file, LONG_FILE_MAX)?, &passports)
        .map_err(|error| Failure::usage(format!("{} can't be used", file.display())).cause(error))
}

#[derive(Serialize)]
struct Tested {
    name: String,
    passed: bool,
    expected: Option<&'static str>,
    expected_because: Option<BTreeSet<String>>,
    decision: Decision,
}

#[derive(Serialize)]
struct Report {
    tests: Vec<Tested>,
    failed: usize,
    /// Policies that decided in none of them.
    untested: BTreeSet<String>,
}

fn test(dir: &Path, json: bool) -> Result<(), Failure> {
    let policies = load(dir)?;
    let file = dir.join("tests.toml");
    let cases = cases(dir, &file)?;
    if cases.is_empty() {
        return Err(Failure::usage(format!(
            "there are no tests in {}",
            file.display()
        )));
    }
    let mut untested: BTreeSet<_> = policies.names().keys().cloned().collect();
    let mut tests = Vec::new();
    for case in cases {
        let (decision, passed) = case.run(&policies);
        let names = decision.because();
        untested.retain(|policy| !names.contains(policy));
        if case.expected.is_none() {
            let what = format!("test {:?} of {} expects nothing", case.name, file.display());
            return Err(Failure::usage(what).hint("say expect = \"permit\" or \"deny\""));
        }
        let expected = case.expected;
        tests.push(Tested {
            name: case.name,
            passed,
            expected: expected.as_ref().map(|expected| word(expected.permitted)),
            expected_because: expected.and_then(|expected| expected.because),
            decision,
        });
    }
    let failed = tests.iter().filter(|test| !test.passed).count();
    let report = Report {
        tests,
        failed,
        untested,
    };
    show(&report, test_text, json)?;
    match report.failed {
        0 => Ok(()),
        1 => Err(Failure::usage("one test failed")),
        count => Err(Failure::usage(format!("{count} tests failed"))),
    }
    .map_err(|failure: Failure| {
        failure.hint("`palanquin policy explain DIR NAME` shows why it is decided so")
    })
}

fn word(permitted: bool) -> &'static str {
    if permitted { "permit" } else { "deny" }
}

fn list(names: &BTreeSet<String>) -> String {
    let names: Vec<_> = names.iter().map(|name| line(name)).collect();
    names.join(", ")
}

fn test_text(report: &Report) -> String {
    let mut text = String::new();
    for test in &report.tests {
        let mark = if test.passed { "ok    " } else { "FAILED" };
        let _ = writeln!(text, "{mark}  {}", line(&test.name));
        if !test.passed {
            let because = test.expected_because.as_ref();
            let because =
                because.map_or_else(String::new, |names| format!(", because: {}", list(names)));
            let expected = test.expected.unwrap_or_default();
            let _ = writeln!(text, "        expected {expected}{because}");
            let (decided, names) = (
                word(test.decision.permitted),
                list(&test.decision.because()),
            );
            let _ = writeln!(text, "        decided  {decided}, because: {names}");
        }
    }
    let _ = writeln!(
        text,
        "{} tests, {} failed.",
        report.tests.len(),
        report.failed
    );
    if !report.untested.is_empty() {
        let _ = writeln!(
            text,
            "In no test did these policies decide: {}.",
            list(&report.untested)
        );
    }
    text
}

fn explain(arguments: &ExplainArgs, json: bool) -> Result<(), Failure> {
    let policies = load(&arguments.dir)?;
    let file = arguments
        .cases
        .clone()
        .unwrap_or_else(|| arguments.dir.join("tests.toml"));
    let cases = cases(&arguments.dir, &file)?;
    let mut case = choose(cases, arguments.name.as_deref(), &file)?.case;
    if let (Some(passport), Some(owner), Some(key)) =
        (&arguments.passport, &arguments.owner, &arguments.key)
    {
        let passport = passport::verified(passport, &passport::trusted(owner, key)?, None)?;
        case.passport = Some((*passport).clone());
    }
    let explanation = policies.explain(&case);
    show(&explanation, explanation_text, json)
}

fn choose(cases: Vec<Rehearsal>, name: Option<&str>, file: &Path) -> Result<Rehearsal, Failure> {
    let names: Vec<_> = cases
        .iter()
        .map(|case| format!("{:?}", case.name))
        .collect();
    let count = cases.len();
    let found = match name {
        Some(name) => cases.into_iter().find(|case| case.name == name),
        None => cases.into_iter().next().filter(|_| count == 1),
    };
    found.ok_or_else(|| {
        let what = match name {
            Some(name) => format!("there is no case {name:?} in {}", file.display()),
            None => format!("there are {count} cases in {}", file.display()),
        };
        names.into_iter().fold(
            Failure::usage(what).hint("name one of these"),
            Failure::cause,
        )
    })
}

fn explanation_text(explanation: &Explanation) -> String {
    let decision = &explanation.decision;
    let mut text = String::new();
    let (action, vm, operator) = (decision.action, decision.vm, &decision.operator);
    let verdict = if decision.permitted {
        "Permitted"
    } else {
        "Refused"
    };
    let at = date(decision.decided_unix_s);
    let _ = writeln!(
        text,
        "{verdict}: {operator} may {}{action} VM {vm} at {at}",
        if decision.permitted { "" } else { "not " }
    );
    for reason in &decision.reasons {
        let (gate, code) = (reason.gate.name(), reason.code);
        let _ = writeln!(text, "  {}  ({gate}, {code})", line(&reason.message));
        let _ = writeln!(text, "    remedy: {}", line(&reason.remedy));
    }
    if !explanation.policies.is_empty() {
        let _ = writeln!(text, "\nPolicies about this operator, action and VM:");
    }
    for trace in &explanation.policies {
        trace_text(trace, &mut text);
    }
    let _ = writeln!(text, "\nPolicies {}", decision.policy_sha256);
    text
}

fn trace_text(trace: &Trace, text: &mut String) {
    let verb = match (trace.forbids, trace.applies) {
        (true, true) => "forbids it",
        (true, false) => "would forbid it, and does not apply",
        (false, true) => "permits it",
        (false, false) => "would permit it, and does not apply",
    };
    let _ = writeln!(
        text,
        "  {} ({}) {verb}",
        line(&trace.policy),
        line(&trace.file)
    );
    for part in &trace.parts {
        let word = if part.unless { "unless" } else { "when" };
        let holds = match part.holds {
            Some(true) => "true",
            Some(false) => "false",
            None => "cannot be said",
        };
        let _ = writeln!(text, "    {word:6} {}  -> {holds}", line(&part.condition));
    }
}
