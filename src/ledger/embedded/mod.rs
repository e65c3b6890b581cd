//! The embedded ledger: one file, one process.
