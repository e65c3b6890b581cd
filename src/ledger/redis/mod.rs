//! The Redis ledger.
