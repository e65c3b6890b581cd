//! The sessions of an app on a shard, and how far a sweep over them is. Pure.

use mio::Token;

/// A list in which each session knows its place, so that leaving costs nothing; and a round over it that may be interrupted
/// by joins and leaves, and begun anew before it is over.
#[derive(Default)]
pub struct Members {
    list: Vec<Token>,
    /// The next place to visit, going round.
    at: usize,
    /// Places still to visit; 0 if no round is under way.
    left: usize,
    /// Sessions that were moved to a place that may have been visited already.
    moved: Vec<Token>,
    /// Visits, less those that joins have added to the rounds under way: what a [`Lap`] is measured by.
    progress: i64,
}

/// A round, of which several may be under way: each begins when something new is to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lap(i64);

impl Members {
    /// Adds a session; returns its place.
    pub fn join(&mut self, token: Token) -> u32 {
        self.list.push(token);
        if self.left > 0 {
            // The round may come by its place before it is over; it must not be visited in place of another.
            self.left += 1;
            self.progress -= 1;
        }
        u32::try_from(self.list.len() - 1).unwrap_or(u32::MAX)
    }

    /// Takes out the session at `place`; returns the one that is there now, if another one is.
    pub fn part(&mut self, place: u32) -> Option<Token> {
        let place = place as usize;
        if place >= self.list.len() {
            return None;
        }
        self.list.swap_remove(place);
        let moved = self.list.get(place).copied();
        if self.left > 0 {
            self.moved.extend(moved);
        }
        moved
    }

    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Begins a round: all who are here will be visited from now on, those who were visited before as well.
    pub const fn begin(&mut self) -> Lap {
        self.left = self.list.len();
        Lap(self.progress + self.left as i64)
    }

    /// Whether all who were here when it began have been visited since, though a later round may be under way.
    pub const fn is_over(&self, lap: Lap) -> bool {
        !self.is_under_way() || (self.moved.is_empty() && self.progress >= lap.0)
    }

    /// The next to visit, `None` when the round is over.
    pub fn visit(&mut self) -> Option<Token> {
        if let Some(token) = self.moved.pop() {
            return Some(token);
        }
        if self.left == 0 || self.list.is_empty() {
            self.left = 0;
            return None;
        }
        if self.at >= self.list.len() {
            self.at = 0;
        }
        let token = self.list[self.at];
        self.at += 1;
        self.left -= 1;
        self.progress += 1;
        Some(token)
    }

    /// Whether a round is under way.
    pub const fn is_under_way(&self) -> bool {
        self.left > 0 || !self.moved.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{HashMap, HashSet};

    #[derive(Debug, Clone)]
    enum Step {
        Join,
        Part(prop::sample::Index),
        Begin,
        Visit(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => Just(Step::Join),
            3 => any::<prop::sample::Index>().prop_map(Step::Part),
            1 => Just(Step::Begin),
            4 => (1usize..5).prop_map(Step::Visit),
        ]
    }

    proptest! {
        #[test]
        fn whoever_is_here_when_a_round_begins_and_stays_is_visited(
            size in 0usize..30, steps in proptest::collection::vec(step(), 1..80)
        ) {
            let mut members = Members::default();
            let mut places: HashMap<Token, u32> = HashMap::new();
            let mut names = 0..;
            for _ in 0..size {
                let token = Token(names.next().unwrap());
                places.insert(token, members.join(token));
            }
            // Those who were here when the latest round began, and have not been visited since.
            let mut due: HashSet<Token> = HashSet::new();
            // The same of every round that is not over.
            let mut laps: Vec<(Lap, HashSet<Token>)> = Vec::new();
            let mut visits_left = 0usize;
            for step in steps {
                match step {
                    Step::Join => {
                        let token = Token(names.next().unwrap());
                        places.insert(token, members.join(token));
                        visits_left += 1;
                    }
                    Step::Part(_) if places.is_empty() => {}
                    Step::Part(index) => {
                        let mut here: Vec<_> = places.iter().map(|(token, place)| (*token, *place)).collect();
                        here.sort();
                        let (token, place) = here[index.index(here.len())];
                        places.remove(&token);
                        due.remove(&token);
                        laps.iter_mut().for_each(|(_, due)| due.retain(|due| *due != token));
                        if let Some(moved) = members.part(place) {
                            places.insert(moved, place);
                            visits_left += 1;
                        }
                    }
                    Step::Begin => {
                        let lap = members.begin();
                        due = places.keys().copied().collect();
                        laps.push((lap, due.clone()));
                        visits_left = due.len() + members.moved.len();
                    }
                    Step::Visit(count) => for _ in 0..count {
                        if let Some(token) = members.visit() {
                            due.remove(&token);
                            laps.iter_mut().for_each(|(_, due)| due.retain(|due| *due != token));
                        }
                    }
                }
                for (lap, due) in &laps {
                    prop_assert!(!members.is_over(*lap) || due.is_empty(), "{due:?} not visited in {lap:?}");
                }
                laps.retain(|(lap, _)| !members.is_over(*lap));
            }
            while let Some(token) = members.visit() {
                due.remove(&token);
                visits_left = visits_left.checked_sub(1).expect("a round ends");
            }
            prop_assert!(due.is_empty(), "{due:?} not visited");
            prop_assert!(!members.is_under_way() && laps.iter().all(|(lap, _)| members.is_over(*lap)));
        }
    }
}
