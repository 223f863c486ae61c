//! The C interface, `include/specache.h`, over the public interface of the engine. Contracts are in the header; what is
//! here keeps them:
//!
//! | module | idea |
//! |---|---|
//! | `status` | errors and panics become a status and a text |
//! | `handles` | handles are names in a table, so that a stale one is an error and not a crash |
//! | `structs` | structs of every header version, by their size |
//! | `memory` | pointers and lengths become slices and texts |
//! | `logits` | what a step has computed stays where it is until somebody wants it |
//! | `engine`, `text`, `session`, `chat`, `generate`, `batch`, `stats` | the functions |
//!
//! Functions are in the order of the header. Each is one call of `status::guard` around safe code.
#![allow(unsafe_code)] // Pointers of C. What makes their use sound is the header's contract.
#![allow(clippy::missing_safety_doc)] // The header is the contract.

mod batch;
mod chat;
mod engine;
mod generate;
mod handles;
mod logits;
mod memory;
mod session;
mod stats;
mod status;
mod structs;
mod text;

pub use batch::*;
pub use chat::*;
pub use engine::*;
pub use generate::*;
pub use handles::{EngineHandle, SessionHandle};
pub use session::*;
pub use stats::*;
pub use status::*;
pub use structs::*;
pub use text::*;

/// Major and minor version of the ABI, as in the header.
pub const SPECACHE_ABI_VERSION: u32 = 1;
