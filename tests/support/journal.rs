//! What was sent for an app, and what its senders were told: noted where it passes, so that no test can leave anything out.

use std::sync::{Arc, Mutex};

use serde_json::Value;

/// One sending of a request; the same request may be sent several times.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// What was sent, as a request by AMQP has it.
    pub request: Value,
    /// Whether it certainly arrived where it is decided: then it must have an end.
    pub taken: bool,
    /// What was told of this very attempt, in the order of arrival.
    pub told: Vec<Value>,
}

#[derive(Debug, Default)]
struct Notes {
    attempts: Vec<Attempt>,
    dead: Vec<String>,
    recalled: Vec<u64>,
}

/// The notes on one app, shared by everyone who sends for it.
#[derive(Debug, Clone)]
pub struct Journal(Option<Arc<Mutex<Notes>>>);

impl Default for Journal {
    fn default() -> Self {
        Self(Some(Arc::default()))
    }
}

impl Journal {
    /// One that takes no notes: whoever runs for hours judges at once, and must not grow.
    pub fn off() -> Self {
        Self(None)
    }

    fn note<T: Default>(&self, note: impl FnOnce(&mut Notes) -> T) -> T {
        self.0.as_ref().map_or_else(T::default, |notes| note(&mut notes.lock().unwrap()))
    }

    /// It is about to be sent; the number of this attempt.
    pub fn sending(&self, request: Value) -> usize {
        self.note(|notes| {
            notes.attempts.push(Attempt { request, taken: false, told: Vec::new() });
            notes.attempts.len() - 1
        })
    }

    /// It arrived.
    pub fn taken(&self, attempt: usize) {
        self.note(|notes| notes.attempts[attempt].taken = true);
    }

    /// Its sender was told this. The API's 503 says that nothing was sent; what it answers otherwise was taken.
    pub fn told(&self, attempt: usize, reply: &Value) {
        self.note(|notes| {
            let attempt = &mut notes.attempts[attempt];
            attempt.taken |= reply["code"].as_u64().is_some_and(|code| code != 503);
            attempt.told.push(reply.clone());
        });
    }

    /// The request of this id was taken from the dead letters.
    pub fn dead(&self, request_id: &str) {
        self.note(|notes| notes.dead.push(request_id.to_owned()));
    }

    /// The broadcast of this id was deleted.
    pub fn recalled(&self, id: u64) {
        self.note(|notes| notes.recalled.push(id));
    }

    /// Every attempt so far, in the order of sending.
    pub fn attempts(&self) -> Vec<Attempt> {
        self.note(|notes| notes.attempts.clone())
    }

    /// The request ids of the dead letters that were taken.
    pub fn dead_letters(&self) -> Vec<String> {
        self.note(|notes| notes.dead.clone())
    }

    /// The ids of what was deleted.
    pub fn recalls(&self) -> Vec<u64> {
        self.note(|notes| notes.recalled.clone())
    }
}
