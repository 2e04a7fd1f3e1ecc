//! Breadth first through all states.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::collections::hash_map::Entry;

use super::Bounds;
use super::step::Step;
use super::world::World;
use crate::mutation::Mutation;

/// What was explored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// States.
    pub states: u32,
    /// Steps between them.
    pub steps: u64,
    /// States that are a good end.
    pub good_ends: u32,
    /// Steps of the longest of the shortest ways to a state.
    pub depth: u32,
}

/// A law that does not hold, and the shortest way there.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The law.
    pub law: String,
    /// States explored until it was found.
    pub states: u32,
    /// One line for each step, and what the machines asked for.
    pub trace: Vec<String>,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { law, states, trace } = self;
        write!(
            f,
            "{law}, found after {states} states\n{}",
            trace.join("\n")
        )
    }
}

/// How a state was reached first.
struct Reached {
    from: u32,
    step: Option<Step>,
    depth: u32,
}

/// Explores all states within the bounds, at most `states_max` of them.
///
/// # Errors
///
/// A law is broken, a state is reached from which no good end is, or there are more states.
pub fn explore(
    bounds: Bounds,
    mutation: Option<Mutation>,
    states_max: u32,
) -> Result<Counts, Box<Violation>> {
    let first = World::new(bounds, mutation);
    let mut explorer = Explorer {
        bounds,
        mutation,
        known: HashMap::from([(first.fingerprint(), 0)]),
        reached: vec![Reached {
            from: 0,
            step: None,
            depth: 0,
        }],
        good: Vec::new(),
        faultless: Vec::new(),
        counts: Counts::default(),
    };
    let mut queue = VecDeque::from([(0, first)]);
    while let Some((index, world)) = queue.pop_front() {
        explorer.expand(index, &world, &mut queue, states_max)?;
    }
    explorer.counts.states = explorer.reached.len() as u32;
    explorer.counts.good_ends = explorer.good.len() as u32;
    explorer.all_lead_to_a_good_end()?;
    Ok(explorer.counts)
}

struct Explorer {
    bounds: Bounds,
    mutation: Option<Mutation>,
    known: HashMap<u64, u32>,
    reached: Vec<Reached>,
    good: Vec<u32>,
    /// Steps without a fault, as pairs of states.
    faultless: Vec<(u32, u32)>,
    counts: Counts,
}

impl Explorer {
    fn expand(
        &mut self,
        index: u32,
        world: &World,
        queue: &mut VecDeque<(u32, World)>,
        states_max: u32,
    ) -> Result<(), Box<Violation>> {
        if world.is_good_end() {
            self.good.push(index);
        }
        let depth = self.reached.get(index as usize).map_or(0, |r| r.depth) + 1;
        for step in world.steps() {
            let mut next = world.clone();
            next.take(step);
            self.counts.steps += 1;
            let new = self.reached.len() as u32;
            let to = match self.known.entry(next.fingerprint()) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(vacant) => {
                    vacant.insert(new);
                    self.reached.push(Reached {
                        from: index,
                        step: Some(step),
                        depth,
                    });
                    self.counts.depth = depth;
                    if let Some(law) = next.check() {
                        return Err(self.violation(new, law));
                    }
                    if new >= states_max {
                        return Err(self.violation(new, "more states than were allowed"));
                    }
                    queue.push_back((new, next));
                    new
                }
            };
            if !step.is_fault() {
                self.faultless.push((index, to));
            }
        }
        Ok(())
    }

    /// From good ends backwards, over steps without a fault.
    fn all_lead_to_a_good_end(&self) -> Result<(), Box<Violation>> {
        let states = self.reached.len();
        // Predecessors of each state, one after the other.
        let mut begins = vec![0_usize; states + 1];
        for &(_, to) in &self.faultless {
            begins[to as usize + 1] += 1;
        }
        for state in 0..states {
            begins[state + 1] += begins[state];
        }
        let mut predecessors = vec![0_u32; self.faultless.len()];
        let mut next = begins.clone();
        for &(from, to) in &self.faultless {
            predecessors[next[to as usize]] = from;
            next[to as usize] += 1;
        }
        let mut leads = vec![false; states];
        let mut work: Vec<u32> = self.good.clone();
        for &good in &self.good {
            leads[good as usize] = true;
        }
        while let Some(state) = work.pop() {
            let state = state as usize;
            for &before in &predecessors[begins[state]..begins[state + 1]] {
                if !leads[before as usize] {
                    leads[before as usize] = true;
                    work.push(before);
                }
            }
        }
        match leads.iter().position(|leads| !leads) {
            Some(stuck) => Err(self.violation(
                stuck as u32,
                "no good end can be reached from here, though nothing more goes wrong",
            )),
            None => Ok(()),
        }
    }

    fn violation(&self, state: u32, law: &str) -> Box<Violation> {
        let mut steps = Vec::new();
        let mut at = state;
        while let Some(Reached {
            from,
            step: Some(step),
            ..
        }) = self.reached.get(at as usize)
        {
            steps.push(*step);
            at = *from;
        }
        let mut world = World::new(self.bounds, self.mutation);
        world.said = Some(Vec::new());
        for step in steps.into_iter().rev() {
            world.take(step);
        }
        let end = world.summary();
        let mut trace = world.said.unwrap_or_default();
        trace.push(end);
        Box::new(Violation {
            law: law.to_owned(),
            states: self.reached.len() as u32,
            trace,
        })
    }
}
