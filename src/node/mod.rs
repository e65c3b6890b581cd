//! The node.
pub mod clock;
pub mod codec;
pub mod entry;
pub mod settings;
pub mod timeline;
