//! Typed access to the fields of a JSON object. Every error names the file, the field, the value found and the fix.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Configuration files are a few kilobytes; anything larger is not one, and is not read.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// A JSON object of a file: the whole file, or an object inside it.
pub(super) struct Fields<'a> {
    file: &'a Path,
    /// `"rope_scaling."` inside that object, empty at the top.
    prefix: String,
    map: Map<String, Value>,
}

/// Reads a text file of a model folder; `None` if there is no such file.
pub(crate) fn read_text(file: &Path) -> Result<Option<String>> {
    let size = match std::fs::metadata(file) {
        Ok(meta) if meta.is_file() => meta.len(),
        Ok(_) => return Err(Error::model(file, "not a regular file")),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(file, e)),
    };
    if size > MAX_TEXT_BYTES {
        return Err(Error::model(file, format!("{size} bytes are too many; at most {MAX_TEXT_BYTES} are read")));
    }
    let bytes = std::fs::read(file).map_err(|e| Error::io(file, e))?;
    let text = String::from_utf8(bytes).map_err(|e| Error::model(file, format!("not UTF-8 text: {e}")))?;
    Ok(Some(text))
}

impl<'a> Fields<'a> {
    /// Parses the text of `file`, which must hold one JSON object.
    pub fn parse(file: &'a Path, json: &str) -> Result<Fields<'a>> {
        match serde_json::from_str(json) {
            Ok(Value::Object(map)) => Ok(Fields { file, prefix: String::new(), map }),
            Ok(other) => Err(Error::model(file, format!("holds {}; it must be a JSON object", show(&other)))),
            Err(e) => Err(Error::model(file, format!("not valid JSON: {e}; download the file again"))),
        }
    }

    /// Whether the field is written in the file, be it as null.
    pub fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// The field's value; `None` if it is absent or null.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    /// Whether any field of the object is itself an object.
    pub fn nested(&self) -> bool {
        self.map.values().any(Value::is_object)
    }

    /// "field NAME is VALUE; FIX".
    pub fn error(&self, name: &str, fix: impl std::fmt::Display) -> Error {
        let found = match self.map.get(name) {
            Some(value) => format!("is {}", show(value)),
            None => "is missing".to_string(),
        };
        Error::model(self.file, format!("field {}{name} {found}; {fix}", self.prefix))
    }

    /// A whole number from 1 to `max`.
    pub fn count(&self, name: &str, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.error(name, format!("it must be a whole number from 1 to {max}"))),
        }
    }

    /// A whole number from 1 to `max` that has no default.
    pub fn required_count(&self, name: &str, max: usize) -> Result<usize> {
        self.count(name, max)?
            .ok_or_else(|| self.error(name, format!("the model needs it: a whole number from 1 to {max}")))
    }

    /// A finite number for which `valid` holds; `range` says in words which those are.
    pub fn number(&self, name: &str, range: &str, valid: impl Fn(f64) -> bool) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() && valid(x) => Ok(Some(x)),
            _ => Err(self.error(name, format!("it must be a number {range}"))),
        }
    }

    /// True or false.
    pub fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(_) => Err(self.error(name, "it must be true or false")),
        }
    }

    /// A string.
    pub fn text(&self, name: &str) -> Result<Option<&str>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(self.error(name, "it must be a string")),
        }
    }

    /// A list of strings.
    pub fn texts(&self, name: &str) -> Result<Option<Vec<&str>>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let list = value.as_array().and_then(|items| items.iter().map(Value::as_str).collect());
        list.map(Some).ok_or_else(|| self.error(name, "it must be a list of strings"))
    }

    /// A token id, or a list of them.
    pub fn token_ids(&self, name: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = match value {
            Value::Array(items) => items.iter().map(id).collect(),
            single => id(single).map(|id| vec![id]),
        };
        ids.map(Some).ok_or_else(|| self.error(name, "it must be a token id or a list of token ids"))
    }

    /// An object inside this one; an empty object counts as absent, as in Hugging Face transformers.
    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Fields { file: self.file, prefix: format!("{}{name}.", self.prefix), map: map.clone() }))
            }
            Some(_) => Err(self.error(name, "it must be an object or null")),
        }
    }
}

/// A value as JSON, cut where it would flood a terminal.
pub(crate) fn show(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text,
    }
}
