//! A run directory: the one place that a run writes to, and what is in it.

pub mod best;
pub mod checkpoint;
pub mod dir;
pub mod events;
pub mod growing;
pub mod lease;
pub mod progress;
pub mod recorder;
pub mod restarts;
pub mod survey;
pub mod tables;

pub use best::Best;
pub use dir::{find_checkpoint, RunDir};
pub use recorder::Recorder;
