//! Why something was permitted or refused, condition by condition.

use cedar_policy::{
    Authorizer, Decision as CedarDecision, Effect, Entities, Policy, PolicyId, PolicySet, Request,
};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Case, Policies, on_a_deep_stack};
use crate::decision::Decision;

/// A decision, and what each policy made of the case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// What would be decided.
    pub decision: Decision,
    /// All policies that are about this operator, action and VM, those that apply first, by name; empty without a passport.
    pub policies: Vec<Trace>,
}

/// What one policy made of the case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Trace {
    /// Its name.
    pub policy: String,
    /// Its file.
    pub file: String,
    /// Whether it is one that forbids.
    pub forbids: bool,
    /// Whether it applies: all that it asks for is so.
    pub applies: bool,
    /// What it asks for.
    pub parts: Vec<Part>,
}

/// A condition of a policy, or one of several that `&&` joins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// Whether it stands under `unless`, and the policy applies only where one of these is false.
    pub unless: bool,
    /// The condition, in Cedar.
    pub condition: String,
    /// Whether it is true; absent where it can't be evaluated by itself, as where an attribute is not there that the part
    /// before asks for.
    pub holds: Option<bool>,
}

impl Policies {
    /// What would be decided on such a case, and why.
    pub fn explain(&self, case: &Case) -> Explanation {
        on_a_deep_stack(|| self.explained(case))
    }

    fn explained(&self, case: &Case) -> Explanation {
        let decision = self.rehearse(case);
        let question = case
            .passport
            .as_ref()
            .and_then(|passport| self.question(case, passport).ok());
        let mut policies: Vec<Trace> = match &question {
            Some((request, entities)) => self
                .set
                .policies()
                .filter_map(|policy| self.trace(policy, request, entities))
                .collect(),
            None => Vec::new(),
        };
        policies.sort_by(|a, b| (!a.applies, &a.policy).cmp(&(!b.applies, &b.policy)));
        Explanation { decision, policies }
    }

    /// What this policy makes of it; nothing if it is about something else.
    fn trace(&self, policy: &Policy, request: &Request, entities: &Entities) -> Option<Trace> {
        let Ok(Value::Object(mut whole)) = policy.to_json() else {
            return None;
        };
        // Whoever forbids is asked as if they permitted: what is wanted is whether the policy applies.
        whole.insert("effect".to_owned(), "permit".into());
        let conditions = whole.insert("conditions".to_owned(), json!([]));
        if holds(&Value::Object(whole.clone()), request, entities) != Some(true) {
            return None;
        }
        let conditions = conditions.unwrap_or_default();
        whole.insert("conditions".to_owned(), conditions.clone());
        let applies = holds(&Value::Object(whole), request, entities) == Some(true);
        let mut parts = Vec::new();
        for condition in conditions.as_array().into_iter().flatten() {
            let unless = condition["kind"] == "unless";
            let mut bodies = Vec::new();
            split(&condition["body"], &mut bodies);
            parts.extend(bodies.into_iter().map(|body| {
                let alone = alone(body);
                Part {
                    unless,
                    condition: text(&alone),
                    holds: holds(&alone, request, entities),
                }
            }));
        }
        let name: &str = policy.id().as_ref();
        Some(Trace {
            policy: name.to_owned(),
            file: self.file_of.get(name).cloned().unwrap_or_default(),
            forbids: policy.effect() == Effect::Forbid,
            applies,
            parts,
        })
    }
}

/// What `&&` joins, from left to right.
fn split<'a>(body: &'a Value, parts: &mut Vec<&'a Value>) {
    match body.get("&&") {
        Some(both) => {
            split(&both["left"], parts);
            split(&both["right"], parts);
        }
        None => parts.push(body),
    }
}

/// The condition as people write it: Cedar keeps `a >= b` as `!(a < b)`.
fn as_written(text: &str) -> String {
    let Some((before, rest)) = text.split_once("!(") else {
        return text.to_owned();
    };
    let mut depth = 1;
    let end = rest.char_indices().find(|(_, c)| {
        depth += match c {
            '(' => 1,
            ')' => -1,
            _ => 0,
        };
        depth == 0
    });
    // Strings may hold anything; then it stays as Cedar writes it.
    let Some((end, _)) = end.filter(|_| !before.contains('"') || is_even(before)) else {
        return text.to_owned();
    };
    let (inner, after) = (&rest[..end], as_written(&rest[end + 1..]));
    let words: Vec<_> = inner.split(' ').collect();
    match words[..] {
        [a, "<", b] => format!("{before}{a} >= {b}{after}"),
        [a, "<=", b] => format!("{before}{a} > {b}{after}"),
        [a, "==", b] => format!("{before}{a} != {b}{after}"),
        _ => format!("{before}!({}){after}", as_written(inner)),
    }
}

/// Whether no string is open at the end.
fn is_even(text: &str) -> bool {
    text.matches('"').count().is_multiple_of(2)
}

/// A policy with this condition only.
fn alone(body: &Value) -> Value {
    json!({
        "effect": "permit",
        "principal": { "op": "All" },
        "action": { "op": "All" },
        "resource": { "op": "All" },
        "conditions": [{ "kind": "when", "body": body }],
    })
}

fn parse(policy: &Value) -> Option<Policy> {
    Policy::from_json(Some(PolicyId::new("part")), policy.clone()).ok()
}

/// Whether the policy permits; nothing if it can't be evaluated.
fn holds(policy: &Value, request: &Request, entities: &Entities) -> Option<bool> {
    let set = PolicySet::from_policies([parse(policy)?]).ok()?;
    let response = Authorizer::new().is_authorized(request, &set, entities);
    match response.diagnostics().errors().next() {
        Some(_) => None,
        None => Some(response.decision() == CedarDecision::Allow),
    }
}

/// The condition of a policy that has one only, in Cedar and in one line.
fn text(policy: &Value) -> String {
    let cedar = parse(policy).and_then(|policy| policy.to_cedar());
    let cedar = cedar.unwrap_or_default();
    let inner = cedar
        .split_once("when {")
        .and_then(|(_, rest)| rest.rsplit_once('}'))
        .map_or("", |(inner, _)| inner);
    let words: Vec<_> = inner.split_whitespace().collect();
    let line = words.join(" ");
    // The writer puts a pair around everything.
    match line
        .strip_prefix('(')
        .and_then(|rest| rest.strip_suffix(')'))
    {
        Some(inner) if is_balanced(inner) => as_written(inner),
        _ => as_written(&line),
    }
}

/// Whether no parenthesis closes what was not opened; strings with parentheses may make this wrong, and then a pair stays.
fn is_balanced(text: &str) -> bool {
    let mut depth = 0_i32;
    text.chars().all(|c| {
        depth += match c {
            '(' => 1,
            ')' => -1,
            _ => 0,
        };
        depth >= 0
    }) && depth == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::tests::{case, files};

    fn trace(case: &Case, policy: &str) -> Trace {
        let policies = Policies::load(&files()).unwrap();
        let explanation = policies.explain(case);
        let found = explanation
            .policies
            .into_iter()
            .find(|trace| trace.policy == policy);
        found.unwrap()
    }

    #[test]
    fn the_condition_that_fails_is_named() {
        let mut stranger = case();
        stranger.passport.as_mut().unwrap().owner =
            "spiffe://example.org/owner/other".parse().unwrap();
        let permit = trace(&stranger, "p1");
        assert!(!permit.forbids && !permit.applies);
        assert_eq!(
            permit.parts,
            [Part {
                unless: false,
                condition: "principal.tenants.contains(resource.tenant)".to_owned(),
                holds: Some(false),
            }]
        );
        assert!(trace(&case(), "p1").applies);
    }

    #[test]
    fn parts_of_an_unless_are_told_apart_and_what_can_t_be_evaluated_is_said() {
        let mut old = case();
        old.target_claims.as_mut().unwrap().age_s = 61;
        let forbid = trace(&old, "f1");
        assert!(forbid.forbids && forbid.applies && forbid.parts.iter().all(|part| part.unless));
        let holds: Vec<_> = forbid.parts.iter().map(|part| part.holds).collect();
        assert_eq!(holds, [Some(true), Some(false)]);
        old.target_claims = None;
        let holds: Vec<_> = trace(&old, "f1")
            .parts
            .iter()
            .map(|part| part.holds)
            .collect();
        assert_eq!(holds, [Some(false), None]);
    }

    #[test]
    fn comparisons_are_told_as_they_were_written() {
        let mut secret = case();
        secret.passport.as_mut().unwrap().sensitivity = 4;
        let forbid = trace(&secret, "f3");
        let conditions: Vec<_> = forbid
            .parts
            .iter()
            .map(|part| part.condition.as_str())
            .collect();
        let second =
            "!((context.approvals >= 1) && context.approverRoles.contains(Role::\"officer\"))";
        assert_eq!(conditions, ["resource.sensitivity >= 4", second]);
        assert!(forbid.applies && forbid.parts.iter().all(|part| part.holds == Some(true)));
    }

    #[test]
    fn a_policy_about_another_action_is_left_out() {
        let policies = Policies::load(&files()).unwrap();
        let mut abort = case();
        abort.action = crate::Action::Abort;
        let names: Vec<_> = policies
            .explain(&abort)
            .policies
            .into_iter()
            .map(|trace| trace.policy)
            .collect();
        assert_eq!(names, ["p2", "f2"]);
    }

    #[test]
    fn a_string_that_looks_like_a_comparison_stays() {
        for text in [
            "a == \"!(b < c)\"",
            "!(a.contains(b) && c)",
            "!a",
            "!(",
            "!(a < b",
        ] {
            assert_eq!(as_written(text), text);
        }
        assert_eq!(as_written("(!(a == b)) || !(c <= d)"), "(a != b) || c > d");
    }

    #[test]
    fn only_the_outer_pair_of_parentheses_goes() {
        assert!(is_balanced("a && (b)"));
        assert!(!is_balanced("a) && (b"));
    }
}
