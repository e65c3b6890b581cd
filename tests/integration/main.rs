//! The integration tests.

mod differential;
