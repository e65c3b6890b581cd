//! The one thread that writes. Whatever waits when it comes round shares one transaction, and so one flush to the disk.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use redb::{Database, Durability, ReadTransaction, ReadableDatabase};
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};
use tracing::{error, info};

use super::Clock;
use super::commit::{Moment, Prepared, Publication, Tables};
use super::presence::Presence;
use super::store::{Failure, Opener, probe};
use crate::broadcast::BroadcastId;
use crate::broadcast::app::AppKey;
use crate::broadcast::verdict::Decision;
use crate::failpoint;
use crate::ledger::{LedgerError, LedgerSettings, Recalled, Stored};

/// How many requests share a transaction at the most: the first of them waits for the last.
const GROUP: usize = 512;
/// How long it waits between two attempts at a disk that fails.
const RETRY: Duration = Duration::from_millis(250);

type Result<T> = std::result::Result<T, LedgerError>;

/// Something to write, and where its answer goes.
pub(super) enum Command {
    Accept(Vec<Prepared>, oneshot::Sender<Vec<Result<Decision>>>),
    Recall(AppKey, BroadcastId, oneshot::Sender<Result<Option<Recalled>>>),
    Restore {
        app: AppKey,
        head: BroadcastId,
        retained: Vec<Stored>,
        recalled: Vec<BroadcastId>,
        answer: oneshot::Sender<Result<u32>>,
    },
    /// App, mark, for how long (ms).
    FirstUse(AppKey, String, u64, oneshot::Sender<Result<bool>>),
    /// A reader met a failure: see whether the disk is there.
    Check,
}

/// A command and its place in the queue, given back with the answer.
pub(super) struct Job {
    pub command: Command,
    pub _place: Option<OwnedSemaphorePermit>,
}

/// What a command came to, in the order of the commands.
enum Outcome {
    Accept(Vec<Result<Decision>>),
    Recall(Result<Option<Recalled>>),
    Restore(Result<u32>),
    FirstUse(Result<bool>),
    Nothing,
}

/// What the callers' threads and the writer's share.
pub(super) struct Shared {
    /// `None` while it could not be reopened. Locked for writing only to reopen it.
    pub database: RwLock<Option<Database>>,
    /// A std Mutex, not tokio's: never held across an await.
    pub presence: Mutex<Presence>,
    pub generation: Mutex<Arc<str>>,
    pub clock: Clock,
    pub settings: LedgerSettings,
    pub health: watch::Sender<std::result::Result<(), String>>,
    /// Whether a [`Command::Check`] is on its way: one at a time.
    pub suspect: AtomicBool,
}

impl Shared {
    pub fn presence(&self) -> MutexGuard<'_, Presence> {
        self.presence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn generation(&self) -> Arc<str> {
        self.generation.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn now_ms(&self) -> u64 {
        (self.clock)() / 1000
    }

    /// Runs `read` on a consistent view of what is durable.
    pub fn view<T>(
        &self,
        read: impl FnOnce(&ReadTransaction) -> std::result::Result<T, Failure>,
    ) -> std::result::Result<T, Failure> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        let database = database.as_ref().ok_or_else(|| self.closed())?;
        read(&database.begin_read()?)
    }

    fn tell(&self, health: std::result::Result<(), String>) {
        drop(self.health.send_replace(health));
    }

    fn closed(&self) -> Failure {
        Failure::Closed(self.health.borrow().clone().err().unwrap_or_else(|| "it is closed".to_owned()))
    }
}

/// The thread's own.
pub(super) struct Writer {
    pub shared: Arc<Shared>,
    pub jobs: Receiver<Job>,
    pub opener: Opener,
    /// Since when, or since the last attempt, the disk fails.
    pub failed: Option<Instant>,
}

/// However the thread ends, `/readyz` says so.
impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.tell(Err("the ledger's writer has stopped".to_owned()));
    }
}

impl Writer {
    /// Until the last sender of jobs is gone.
    pub fn run(mut self) {
        loop {
            let next = match self.failed {
                None => self.jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(_) => self.jobs.recv_timeout(RETRY),
            };
            if self.failed.is_some_and(|at| at.elapsed() >= RETRY) {
                self.reopen();
            }
            match next {
                Ok(job) => self.group(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn group(&mut self, first: Job) {
        let mut size = first.command.size();
        let mut jobs = vec![first];
        while size < GROUP
            && let Ok(job) = self.jobs.try_recv()
        {
            size += job.command.size();
            jobs.push(job);
        }
        let result = match self.failed {
            Some(_) => Err(self.shared.closed()),
            None => self.transact(&jobs),
        };
        match result {
            Ok((outcomes, published)) => {
                self.publish(&published);
                jobs.into_iter().zip(outcomes).for_each(|(job, outcome)| job.answer(outcome));
            }
            Err(failure) => {
                let error = LedgerError::from(&failure);
                self.fail(&failure);
                jobs.into_iter().for_each(|job| job.fail(&error));
            }
        }
    }

    /// Everything in one transaction, durable when this returns; or nothing.
    fn transact(&self, jobs: &[Job]) -> std::result::Result<(Vec<Outcome>, Vec<Publication>), Failure> {
        let database = self.shared.database.read().unwrap_or_else(PoisonError::into_inner);
        let database = database.as_ref().ok_or_else(|| self.shared.closed())?;
        let mut transaction = database.begin_write()?;
        transaction
            .set_durability(Durability::Immediate)
            .map_err(|error| Failure::Storage(redb::Error::from(error)))?;
        let (mut outcomes, mut published) = (Vec::with_capacity(jobs.len()), Vec::new());
        let writes = {
            let mut tables = Tables::open(&transaction)?;
            for job in jobs {
                outcomes.push(self.apply(&job.command, &mut tables, &mut published)?);
            }
            if tables.writes() > 0 {
                tables.forget_requests(self.shared.now_ms())?;
                tables.forget_used(self.shared.now_ms())?;
            }
            tables.writes()
        };
        // A flood of refused or repeated requests costs the disk nothing.
        if writes == 0 {
            transaction.abort()?
        } else {
            failpoint::reached("embedded::before-commit", "");
            transaction.commit()?;
            failpoint::reached("embedded::after-commit", "");
        }
        Ok((outcomes, published))
    }

    fn apply(
        &self,
        command: &Command,
        tables: &mut Tables<'_>,
        published: &mut Vec<Publication>,
    ) -> std::result::Result<Outcome, Failure> {
        let generation = self.shared.generation();
        let audience = |app: &AppKey, now_ms| self.shared.presence().audience(app, now_ms);
        let moment = || Moment {
            now_us: (self.shared.clock)(),
            generation: &generation,
            settings: self.shared.settings,
            audience: &audience,
        };
        Ok(match command {
            Command::Accept(requests, _) => {
                let mut decisions = Vec::with_capacity(requests.len());
                for request in requests {
                    decisions.push(alone(tables.accept(request, &moment()))?.map(|(decision, publication)| {
                        published.extend(publication);
                        decision
                    }));
                }
                Outcome::Accept(decisions)
            }
            Command::Recall(app, id, _) => Outcome::Recall(alone(tables.recall(app, *id, &moment()))?.map(|found| {
                found.map(|(recalled, publication)| {
                    published.push(publication);
                    recalled
                })
            })),
            Command::Restore { app, head, retained, recalled, .. } => {
                Outcome::Restore(alone(tables.restore(app.as_str(), *head, retained, recalled, &moment()))?)
            }
            Command::FirstUse(app, mark, time_ms, _) => {
                let now_ms = self.shared.now_ms();
                Outcome::FirstUse(alone(tables.first_use(app.as_str(), mark, *time_ms, now_ms))?)
            }
            Command::Check => {
                self.shared.suspect.store(false, Ordering::Release);
                Outcome::Nothing
            }
        })
    }

    /// After the commit only, and in the order of the ids. Leases are looked at now: a node that joined since the decision
    /// may have read the state before the commit.
    fn publish(&self, published: &[Publication]) {
        if published.is_empty() {
            return;
        }
        let now_ms = self.shared.now_ms();
        let mut presence = self.shared.presence();
        for Publication { app, raw } in published {
            presence.publish(app, raw, now_ms);
        }
    }

    /// Whether the transaction that failed is on the disk is unknown until the file is opened again; either way it is whole.
    fn fail(&mut self, reason: &Failure) {
        self.shared.suspect.store(false, Ordering::Release);
        if self.failed.is_none() {
            error!(%reason, "the ledger's file fails; reopening it until it works again");
            self.shared.tell(Err(reason.to_string()));
            self.failed = Some(Instant::now());
        }
    }

    /// redb refuses everything after an I/O error until the file is opened again.
    fn reopen(&mut self) {
        let mut place = self.shared.database.write().unwrap_or_else(PoisonError::into_inner);
        // Closed first: the file is locked.
        drop(place.take());
        let opened = (self.opener)().map_err(|error| Failure::Storage(redb::Error::from(error)));
        let result = opened.and_then(|database| {
            let probed = probe(&database);
            // A disk that takes no writes may still be read.
            *place = Some(database);
            probed
        });
        drop(place);
        match result {
            Ok(()) => {
                info!("the ledger's file works again");
                self.failed = None;
                self.shared.tell(Ok(()));
                self.shared.presence().interrupt();
            }
            Err(failure) => {
                self.failed = Some(Instant::now());
                self.shared.tell(Err(failure.to_string()));
            }
        }
    }
}

/// Lets an unreadable row be one call's error, and anything else the transaction's.
fn alone<T>(result: std::result::Result<T, Failure>) -> std::result::Result<Result<T>, Failure> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(failure @ Failure::Row(_)) => Ok(Err(LedgerError::from(&failure))),
        Err(failure) => Err(failure),
    }
}

impl Command {
    const fn size(&self) -> usize {
        match self {
            Self::Accept(requests, _) => requests.len(),
            Self::Restore { retained, .. } => 1 + retained.len(),
            Self::Recall(..) | Self::FirstUse(..) | Self::Check => 1,
        }
    }
}

// A caller that stopped waiting does not mind.
impl Job {
    fn answer(self, outcome: Outcome) {
        match (self.command, outcome) {
            (Command::Accept(_, answer), Outcome::Accept(decisions)) => drop(answer.send(decisions)),
            (Command::Recall(_, _, answer), Outcome::Recall(recalled)) => drop(answer.send(recalled)),
            (Command::Restore { answer, .. }, Outcome::Restore(count)) => drop(answer.send(count)),
            (Command::FirstUse(.., answer), Outcome::FirstUse(first)) => drop(answer.send(first)),
            // apply() makes the outcome of each command's own kind.
            _ => {}
        }
    }

    fn fail(self, error: &LedgerError) {
        match self.command {
            Command::Accept(requests, answer) => {
                drop(answer.send(requests.iter().map(|_| Err(error.clone())).collect()));
            }
            Command::Recall(_, _, answer) => drop(answer.send(Err(error.clone()))),
            Command::Restore { answer, .. } => drop(answer.send(Err(error.clone()))),
            Command::FirstUse(.., answer) => drop(answer.send(Err(error.clone()))),
            Command::Check => {}
        }
    }
}
