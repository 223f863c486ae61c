//! Random-weight shapes for benchmarks.

use super::Model;
use crate::error::{Error, Result};

/// Makes a model.
pub fn model(shape: &str) -> Result<Model> {
    Err(Error::Usage(format!("synthetic:{shape}: not yet")))
}
