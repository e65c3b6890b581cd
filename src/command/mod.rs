//! The commands that a person runs against a server.
