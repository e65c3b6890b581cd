//! broadcastd: a broadcast ("message to every user of an app") system for teams that already run a backend.
//!
//! The path of one broadcast, by folder: `worker` (or `api`) takes the request in, `ledger` decides and publishes it in one
//! step, `node` delivers it to the devices. `broadcast` holds the rules, and does no I/O. See ARCHITECTURE.md.

pub mod admin;
pub mod amqp;
pub mod api;
pub mod app;
pub mod backoff;
pub mod broadcast;
pub mod command;
pub mod failpoint;
#[doc(hidden)]
pub mod fuzzing;
pub mod ledger;
pub mod metrics;
pub mod node;
pub mod settings;
pub mod telemetry;
pub mod tls;
pub mod worker;
