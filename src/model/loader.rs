//! Hugging Face model folders.

use std::path::Path;

use super::Model;
use crate::error::{Error, Result};

/// Loads a folder.
pub fn load(dir: &Path) -> Result<Model> {
    Err(Error::model(dir, "not yet"))
}
