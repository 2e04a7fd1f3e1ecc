//! Reads policies and validates them: what is not understood is refused here, so that it is not skipped later.

use std::collections::{BTreeMap, BTreeSet};

use cedar_policy::{EntityTypeName, PolicyId, PolicySet, Schema, ValidationMode, Validator};
use minicbor::Encode;
use palanquin_api::config::is_name;

use super::directory::Directory;
use super::{Policies, SCHEMA, on_a_deep_stack};
use crate::cbor;
use crate::digest::Sha256;
use crate::identity::Identity;

/// Longest file in bytes.
pub const FILE_MAX: usize = 256 * 1024;
/// Most files of policies.
pub const FILES_MAX: usize = 64;
/// Most policies.
pub const POLICIES_MAX: usize = 1000;

/// Most words, strings and signs in a policy, between two semicolons. Cedar's parser, validator and evaluator recurse, and
/// too long a chain (`a.b.c`, `1 + 1 + 1`) would end the process, or pass the validator unseen.
pub const TOKENS_MAX: usize = 500;
/// Deepest nesting of parentheses, brackets and braces, for the same reason.
pub const NESTING_MAX: usize = 32;

/// The files of a provider's policies, as texts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    /// Policies: name of the file and its text.
    pub policies: BTreeMap<String, String>,
    /// `directory.toml`.
    pub directory: String,
}

/// Something that is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Name of the file.
    pub file: String,
    /// What.
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.file, self.message)
    }
}

/// Policies that can't be used; all that is wrong with them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} problems, the first: {}", .0.len(), .0.first().map(ToString::to_string).unwrap_or_default())]
pub struct LoadError(pub Vec<Problem>);

/// What the digest is made of.
#[derive(Encode)]
struct Hashed<'a> {
    #[n(0)]
    label: &'static str,
    #[n(1)]
    schema: &'static str,
    #[n(2)]
    policies: &'a BTreeMap<String, String>,
    #[n(3)]
    directory: &'a str,
}

/// The schema that is shipped.
fn schema() -> Result<Schema, String> {
    let parsed = Schema::from_cedarschema_str(SCHEMA);
    parsed
        .map(|(schema, _)| schema)
        .map_err(|error| error.to_string())
}

/// An error of Cedar with its causes, in one line.
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

impl Policies {
    /// Reads and validates.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the files.
    pub fn load(files: &Files) -> Result<Self, LoadError> {
        on_a_deep_stack(|| Self::load_all(files))
    }

    fn load_all(files: &Files) -> Result<Self, LoadError> {
        let mut found = Vec::new();
        let mut note = |file: &str, message: String| {
            let file = file.to_owned();
            found.push(Problem { file, message });
        };
        let directory = if files.directory.len() > FILE_MAX * 16 {
            note(
                "directory.toml",
                format!("more than {} bytes", FILE_MAX * 16),
            );
            None
        } else {
            match Directory::from_toml(&files.directory) {
                Ok(directory) => Some(directory),
                Err(problems) => {
                    problems.into_iter().for_each(|p| note("directory.toml", p));
                    None
                }
            }
        };
        let (set, file_of) = read(files, &mut note);
        let schema = match schema() {
            Ok(schema) => Some(schema),
            Err(error) => {
                note("palanquin.cedarschema", error);
                None
            }
        };
        if let Some(schema) = &schema {
            validate(schema, &set, &file_of, &mut note);
        }
        if let Some(directory) = &directory {
            undeclared(directory, &set, &file_of, &mut note);
        }
        let (Some(directory), Some(schema), true) = (directory, schema, found.is_empty()) else {
            found.sort();
            return Err(LoadError(found));
        };
        let sha256 = Sha256::of(&cbor::to_vec(&Hashed {
            label: "palanquin policies 1",
            schema: SCHEMA,
            policies: &files.policies,
            directory: &files.directory,
        }));
        Ok(Self {
            set,
            schema,
            directory,
            sha256,
            file_of,
        })
    }
}

/// All policies under the names that their `@id` gives them, and the file of each.
fn read(
    files: &Files,
    note: &mut impl FnMut(&str, String),
) -> (PolicySet, BTreeMap<String, String>) {
    let mut set = PolicySet::new();
    let mut file_of = BTreeMap::new();
    if files.policies.len() > FILES_MAX {
        note("*.cedar", format!("more than {FILES_MAX} files"));
        return (set, file_of);
    }
    for (file, text) in &files.policies {
        if text.len() > FILE_MAX {
            note(file, format!("more than {FILE_MAX} bytes"));
            continue;
        }
        if let Err(what) = judge_size(text) {
            note(file, what);
            continue;
        }
        let parsed: PolicySet = match text.parse() {
            Ok(parsed) => parsed,
            Err(errors) => {
                let errors: &cedar_policy::ParseErrors = &errors;
                errors.iter().for_each(|error| note(file, told(error)));
                continue;
            }
        };
        if parsed.num_of_templates() > 0 {
            note(
                file,
                "templates (?principal, ?resource) are not used here and would be skipped"
                    .to_owned(),
            );
        }
        for policy in parsed.policies() {
            let Some(id) = policy.annotation("id").filter(|id| is_name(id)) else {
                let text = policy.to_cedar().unwrap_or_default();
                let line = text.lines().last().unwrap_or_default().to_owned();
                note(
                    file,
                    format!("a policy without a proper name, as in @id(\"p1-owner\"): {line}"),
                );
                continue;
            };
            if let Some(other) = file_of.insert(id.to_owned(), file.clone()) {
                note(file, format!("there is a policy {id:?} in {other} already"));
                continue;
            }
            if set.add(policy.new_id(PolicyId::new(id))).is_err() {
                note(file, format!("policy {id:?} can't be added"));
            }
        }
    }
    if file_of.len() > POLICIES_MAX {
        note("*.cedar", format!("more than {POLICIES_MAX} policies"));
    }
    (set, file_of)
}

/// Whether all policies are short and flat enough to be parsed.
fn judge_size(text: &str) -> Result<(), String> {
    let (mut depth, mut tokens, mut line) = (0_usize, 0_usize, 1);
    let mut bytes = text.bytes().peekable();
    while let Some(byte) = bytes.next() {
        let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
        match byte {
            b'\n' => line += 1,
            b' ' | b'\t' | b'\r' => continue,
            b'/' if bytes.peek() == Some(&b'/') => {
                while bytes.next_if(|next| *next != b'\n').is_some() {}
                continue;
            }
            b'"' => {
                while let Some(inside) = bytes.next() {
                    match inside {
                        b'"' => break,
                        b'\\' => drop(bytes.next()),
                        _ => {}
                    }
                }
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            b';' => tokens = 0,
            byte if is_word(&byte) => while bytes.next_if(is_word).is_some() {},
            _ => {}
        }
        tokens += usize::from(byte != b'\n');
        if depth > NESTING_MAX {
            return Err(format!("line {line}: nested more than {NESTING_MAX} deep"));
        }
        if tokens > TOKENS_MAX {
            return Err(format!(
                "line {line}: a policy of more than {TOKENS_MAX} words and signs; make it several, or name a group"
            ));
        }
    }
    Ok(())
}

/// Types, names and comparisons, by the schema. A warning counts as an error: it says that a policy never applies or that
/// two names look the same, and neither may be overlooked.
fn validate(
    schema: &Schema,
    set: &PolicySet,
    file_of: &BTreeMap<String, String>,
    note: &mut impl FnMut(&str, String),
) {
    let result = Validator::new(schema.clone()).validate(set, ValidationMode::Strict);
    let file = |id: &PolicyId| {
        let id: &str = id.as_ref();
        file_of.get(id).map_or("*.cedar", String::as_str)
    };
    for error in result.validation_errors() {
        note(file(error.policy_id()), told(error));
    }
    for warning in result.validation_warnings() {
        note(file(warning.policy_id()), told(warning));
    }
}

/// Roles, groups and identities that a policy names and the directory does not: a policy that speaks of nobody is a
/// mistake, and one that forbids something for nobody a hole.
fn undeclared(
    directory: &Directory,
    set: &PolicySet,
    file_of: &BTreeMap<String, String>,
    note: &mut impl FnMut(&str, String),
) {
    for policy in set.policies() {
        let literals: BTreeSet<_> = policy.entity_literals().into_iter().collect();
        for uid in literals {
            let name: &str = uid.id().unescaped();
            let kind = EntityTypeName::to_string(uid.type_name());
            let identity = name.parse::<Identity>().ok();
            let is_declared = match kind.as_str() {
                "Role" => directory.roles.contains(name),
                "HostGroup" => directory.groups.contains(name),
                "Operator" => identity.is_some_and(|i| directory.operators.contains_key(&i)),
                "Host" => identity.is_some_and(|i| directory.hosts.contains_key(&i)),
                "Tenant" => identity.is_some_and(|i| i.kind() == crate::Kind::Owner),
                "Vm" => name
                    .parse::<uuid::Uuid>()
                    .is_ok_and(|vm| vm.to_string() == name),
                _ => true,
            };
            if !is_declared {
                let id: &str = policy.id().as_ref();
                let file = file_of.get(id).map_or("*.cedar", String::as_str);
                note(
                    file,
                    format!("policy {id:?} speaks of {uid}, which directory.toml does not know"),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::tests::files;

    fn problems(policy: &str) -> Vec<String> {
        let mut files = files();
        files
            .policies
            .insert("z.cedar".to_owned(), policy.to_owned());
        let error = Policies::load(&files).unwrap_err();
        error.0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_schema_and_the_policies_of_the_tests_are_valid() {
        assert!(Policies::load(&files()).is_ok());
    }

    #[test]
    fn what_would_be_skipped_when_it_is_evaluated_is_refused_when_it_is_loaded() {
        let cases = [
            (
                "@id(\"x\") forbid(principal, action, resource) when { resource.secret };",
                "attribute `secret`",
            ),
            (
                "@id(\"x\") forbid(principal, action, resource) when { resource.sensitivity > \"3\" };",
                "expected",
            ),
            (
                "@id(\"x\") forbid(principal, action, resource) when { context.targetAttestation.ageS > 60 };",
                "optional attribute",
            ),
            (
                "@id(\"x\") forbid(principal, action == Action::\"migrate\", resource);",
                "migrate",
            ),
            (
                "@id(\"x\") forbid(principal in Role::\"migratr\", action, resource);",
                "does not know",
            ),
            (
                "@id(\"x\") forbid(principal == Operator::\"alice\", action, resource);",
                "does not know",
            ),
            (
                "@id(\"x\") forbid(principal, action, resource) when { context.target in HostGroup::\"gld\" };",
                "does not know",
            ),
            (
                "@id(\"x\") forbid(principal, action, resource) when { resource.tenant == Tenant::\"acme\" };",
                "does not know",
            ),
            (
                "@id(\"x\") forbid(principal, action, resource) when { principal is Host };",
                "impossible",
            ),
            (
                "@id(\"x\") forbid(principal == ?principal, action, resource);",
                "templates",
            ),
            (
                "forbid(principal, action, resource);",
                "without a proper name",
            ),
            (
                "@id(\"x y\") forbid(principal, action, resource);",
                "without a proper name",
            ),
            (
                "@id(\"p1\") forbid(principal, action, resource);",
                "already",
            ),
            (
                "@id(\"x\") forbid(principal, action, resource",
                "unexpected end",
            ),
            ("}}}", "unexpected token"),
        ];
        for (policy, expected) in cases {
            let found = problems(policy);
            assert!(
                found.iter().all(|problem| problem.starts_with("z.cedar: ")),
                "{found:?}"
            );
            assert!(
                found.iter().any(|problem| problem.contains(expected)),
                "{policy}: {found:?}"
            );
        }
    }

    #[test]
    fn everything_that_is_wrong_is_told_at_once() {
        let mut files = files();
        files.directory = files.directory.replace("version = 7", "version = 0");
        files
            .policies
            .insert("a.cedar".to_owned(), "nonsense".to_owned());
        let typo = "@id(\"x\") forbid(principal, action, resource) when { resource.secret };";
        files.policies.insert("b.cedar".to_owned(), typo.to_owned());
        let error = Policies::load(&files).unwrap_err();
        let names: Vec<_> = error
            .0
            .iter()
            .map(|problem| problem.file.as_str())
            .collect();
        assert_eq!(names, ["a.cedar", "b.cedar", "directory.toml"]);
    }

    #[test]
    fn files_that_are_too_long_or_too_many_are_refused() {
        assert!(problems(&" ".repeat(FILE_MAX + 1))[0].contains("more than"));
        let mut many = files();
        for n in 0..FILES_MAX {
            many.policies.insert(format!("{n}.cedar"), String::new());
        }
        assert!(Policies::load(&many).is_err());
    }

    #[test]
    fn what_is_nested_too_deep_is_refused_and_what_is_not_is_seen_to_its_end() {
        let policy = |condition: &str| {
            format!("@id(\"x\") forbid(principal, action, resource) when {{ {condition} }};")
        };
        for depth in [NESTING_MAX, 20_000] {
            let nested = policy(&format!("{}true{}", "(".repeat(depth), ")".repeat(depth)));
            assert!(problems(&nested)[0].contains("nested more than 32 deep"));
        }
        // As long as a policy may be, in every way that recurses without brackets; with a mistake at its very end.
        let chains = [
            ("resource.legalHold && ", 5),
            ("resource.legalHold || ", 5),
            ("if resource.legalHold then true else ", 7),
            ("1 + ", 2),
        ];
        for (part, tokens) in chains {
            let chain = |count: usize, end: &str| policy(&format!("{}{end}", part.repeat(count)));
            let most = (TOKENS_MAX - 40) / tokens;
            let found = problems(&chain(most, "resource.secret == 1"));
            assert!(found[0].contains("attribute `secret`"), "{part}: {found:?}");
            let mut files = files();
            let good = chain(most, "resource.sensitivity == 9");
            files.policies.insert("n.cedar".to_owned(), good);
            if let Ok(policies) = Policies::load(&files) {
                let _ = policies.explain(&crate::policy::tests::case());
            }
            let found = problems(&chain(TOKENS_MAX, "true"));
            assert!(found[0].contains("more than 500 words"), "{found:?}");
        }
        let dots = problems(&policy(&format!("resource{}", ".x".repeat(230))));
        assert!(dots[0].contains("attribute `x`"), "{dots:?}");
        let nots = problems(&policy(&format!("{}true", "!".repeat(400))));
        assert!(!nots.is_empty());
    }

    #[test]
    fn a_short_stack_changes_nothing() {
        let dots = format!(
            "@id(\"x\") forbid(principal, action, resource) when {{ resource{} }};",
            ".x".repeat(230)
        );
        let thread = std::thread::Builder::new().stack_size(128 << 10);
        let found = thread
            .spawn(move || problems(&dots))
            .unwrap()
            .join()
            .unwrap();
        assert!(found[0].contains("attribute `x`"), "{found:?}");
    }

    #[test]
    fn strings_and_comments_do_not_nest() {
        let brackets = "( ".repeat(1000);
        assert_eq!(
            judge_size(&format!("// {brackets}\n \"\\\"{brackets}\" ()")),
            Ok(())
        );
        assert!(
            judge_size(&format!("// x\n{brackets}"))
                .unwrap_err()
                .starts_with("line 2")
        );
        let (half, more) = ("a ".repeat(TOKENS_MAX / 2), "a\n".repeat(TOKENS_MAX + 1));
        assert_eq!(judge_size(&format!("{half};{half}")), Ok(()));
        assert!(
            judge_size(&more)
                .unwrap_err()
                .starts_with("line 501: a policy")
        );
    }

    #[test]
    fn the_digest_changes_with_every_file() {
        let sha256 = |files: &Files| Policies::load(files).unwrap().sha256();
        let mut directory = files();
        directory.directory.push('\n');
        let mut policy = files();
        policy.policies.get_mut("p.cedar").unwrap().push('\n');
        let mut renamed = files();
        let text = renamed.policies.remove("p.cedar").unwrap();
        renamed.policies.insert("q.cedar".to_owned(), text);
        let all: BTreeSet<_> = [&files(), &directory, &policy, &renamed].map(sha256).into();
        assert_eq!(all.len(), 4);
        assert_eq!(sha256(&files()), sha256(&files()));
    }
}
