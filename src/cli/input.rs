//! What the user gives: prompts and lists of token ids, checked before any work begins.

use std::path::Path;

use serde_json::Value;
use specache::error::{Error, Result};
use specache::tokenizer::Tokenizer;

use super::args::PromptArgs;

/// The tokenizer of a model; `None` for a folder without one and for random weights.
///
/// # Errors
/// [`Error::Model`] for a file that is not a tokenizer, or belongs to another model.
pub fn tokenizer(model: &str, vocab_size: usize) -> Result<Option<Tokenizer>> {
    if model.starts_with("synthetic:") {
        return Ok(None);
    }
    let tokenizer = Tokenizer::load(Path::new(model))?;
    if let Some(tokenizer) = &tokenizer {
        tokenizer.check_vocab(vocab_size)?;
    }
    Ok(tokenizer)
}

/// What the prompt is made from.
pub enum Source {
    /// Text, for the tokenizer.
    Text(String),
    /// Token ids, from which file.
    Ids(Vec<u32>),
}

/// Reads the prompt. Needs no model, so that mistakes show before one is loaded.
///
/// # Errors
/// [`Error::Usage`] for no prompt, several, an empty one, text that is not UTF-8, a bad list of ids; [`Error::Io`] for a
/// file that cannot be read.
pub fn prompt(args: &PromptArgs) -> Result<Source> {
    let usage = |what: String| Err(Error::Usage(what));
    let source = match (&args.prompt, &args.file, &args.tokens) {
        (Some(text), None, None) => Source::Text(text.clone()),
        (None, Some(file), None) => match String::from_utf8(read(file)?) {
            Ok(text) => Source::Text(text),
            Err(e) => {
                let at = e.utf8_error().valid_up_to();
                return usage(format!("-f {}: byte {at} is not valid UTF-8; convert the file", file.display()));
            }
        },
        (None, None, Some(file)) => Source::Ids(ids("--tokens", file)?),
        (None, None, None) => return usage("no prompt: give one of -p/--prompt, -f/--file or --tokens".into()),
        _ => return usage("several prompts: give only one of -p/--prompt, -f/--file and --tokens".into()),
    };
    match &source {
        Source::Text(text) if text.is_empty() => usage("the prompt is empty: at least one token is needed".into()),
        Source::Ids(ids) if ids.is_empty() => usage("--tokens: the list is empty: at least one is needed".into()),
        _ => Ok(source),
    }
}

/// A file with a JSON array of token ids.
///
/// # Errors
/// [`Error::Usage`] naming the first entry that is not an id.
pub fn ids(option: &str, file: &Path) -> Result<Vec<u32>> {
    let wrong = |what: String| Error::Usage(format!("{option} {}: {what}", file.display()));
    let json: Value = serde_json::from_slice(&read(file)?)
        .map_err(|e| wrong(format!("not JSON ({e}); an array of ids is needed")))?;
    let Value::Array(entries) = json else {
        return Err(wrong("not a JSON array; a bare array of token ids is needed, such as [1, 2, 3]".into()));
    };
    let id = |(i, entry): (usize, &Value)| {
        let id = entry.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| {
            wrong(format!("entry {i} is {}; token ids are whole numbers from 0 to 2^32 - 1", brief(entry)))
        })
    };
    entries.iter().enumerate().map(id).collect()
}

/// Checks ids against a model.
///
/// # Errors
/// [`Error::Usage`] naming the first entry beyond the vocabulary.
pub fn check_ids(option: &str, ids: &[u32], vocab_size: usize) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(i) => {
            let (id, last) = (ids[i], vocab_size - 1);
            Err(Error::Usage(format!(
                "{option}: entry {i} is {id}, beyond this model's vocabulary, which ends at {last}"
            )))
        }
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).map_err(|e| Error::io(file, e))
}

/// An entry as an error shows it.
fn brief(entry: &Value) -> String {
    let text = entry.to_string();
    if text.chars().count() > 40 { text.chars().take(40).chain("...".chars()).collect() } else { text }
}
