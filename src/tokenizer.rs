//! Text to token ids and back: `tokenizer.json` through the `tokenizers` crate.
//!
//! That crate panics on some files that are not tokenizers, and in some calls of those that it takes; fuzzing finds such
//! files in seconds. So its calls are guarded: a panic inside becomes an error that names the file.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::fields::{read_text, show};

/// Token ids as JSON: a bare array of whole numbers.
///
/// # Errors
/// What is wrong, and with which entry, for the caller to say where the text comes from.
pub fn ids_of_json(json: &[u8]) -> Result<Vec<u32>, String> {
    let json: Value = serde_json::from_slice(json).map_err(|e| format!("not JSON ({e}); an array of ids is needed"))?;
    let Value::Array(entries) = json else {
        return Err("not a JSON array; a bare array of token ids is needed, such as [1, 2, 3]".into());
    };
    let id = |(i, entry): (usize, &Value)| {
        let id = entry.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| format!("entry {i} is {}; token ids are whole numbers from 0 to 2^32 - 1", show(entry)))
    };
    entries.iter().enumerate().map(id).collect()
}

thread_local!(static GUARDED: Cell<bool> = const { Cell::new(false) });

/// Whether this thread is in a call whose panics become errors, so that a panic hook has nothing to say.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

/// Calls the `tokenizers` crate.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    let before = GUARDED.replace(true);
    // What a call leaves half done is dropped with the error, or only read.
    let outcome = catch_unwind(AssertUnwindSafe(call));
    GUARDED.set(before);
    match outcome {
        Ok(outcome) => outcome.map_err(|e| e.to_string()),
        Err(panic) => {
            let what = panic.downcast_ref::<String>().map(String::as_str);
            Err(what.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_string())
        }
    }
}

/// The tokenizer of a model folder.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    file: PathBuf,
    /// The token with the highest id.
    last: Option<(String, u32)>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder; `None` if there is none (token ids still work).
    ///
    /// # Errors
    /// [`Error::Model`] if the file is not a tokenizer.
    pub fn load(dir: &Path) -> Result<Option<Tokenizer>> {
        let file = dir.join("tokenizer.json");
        let Some(json) = read_text(&file)? else { return Ok(None) };
        let load = || {
            let mut inner = tokenizers::Tokenizer::from_bytes(json.as_bytes())?;
            // Files carry what training used; a prompt must be neither cut nor filled up.
            inner.with_padding(None);
            inner.with_truncation(None)?;
            let last = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
            Ok((inner, last))
        };
        match guarded(load) {
            Ok((inner, last)) => Ok(Some(Tokenizer { inner, file, last })),
            Err(e) => Err(Error::model(&file, format!("not a usable tokenizer: {e}; download the file again"))),
        }
    }

    /// The ids of a text. `add_special` adds what the model's post-processor adds, such as a first token.
    ///
    /// # Errors
    /// [`Error::Model`] if the tokenizer has no id for a part of the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special)).map_err(|e| self.error("encode", e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of some ids, without special tokens. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Model`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded(|| self.inner.decode(ids, true)).map_err(|e| self.error("decode", e))
    }

    /// The id of one token, written as in `tokenizer.json`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The highest id plus one.
    pub fn n_ids(&self) -> usize {
        self.last.as_ref().map_or(0, |(_, id)| *id as usize + 1)
    }

    /// Checks that every id has a row in the embedding of `vocab_size` rows. (More rows than ids are common: padding.)
    ///
    /// # Errors
    /// [`Error::Model`] naming both sizes.
    pub fn check_vocab(&self, vocab_size: usize) -> Result<()> {
        match &self.last {
            Some((token, id)) if *id as usize >= vocab_size => Err(Error::model(
                &self.file,
                format!(
                    "token {token:?} has id {id}, but config.json has a vocab_size of {vocab_size}; \
                     the tokenizer belongs to another model"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// A decoder for ids that arrive one by one and continue a text that ends with `context` (may be empty): tokenizers
    /// of the SentencePiece kind drop the space before a text's first token, and must see that it is not the first.
    pub fn stream(&self, context: &[u32]) -> Stream<'_> {
        let tail = context.len().saturating_sub(MAX_PENDING);
        Stream { tokenizer: self, context: context[tail..].to_vec(), pending: Vec::new() }
    }

    fn error(&self, action: &str, fault: impl std::fmt::Display) -> Error {
        Error::model(&self.file, format!("cannot {action}: {fault}"))
    }
}

/// Ids that may wait for the rest of a character. A character has at most 4 bytes and every id yields at least one;
/// ids that end inside a character several times in a row are rare, so whatever waits longer is not text.
const MAX_PENDING: usize = 16;

/// Turns ids into text as they arrive, and holds bytes back until their character is whole.
pub struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    /// Ids just before `pending`, already shown: decoders look at neighbours.
    context: Vec<u32>,
    /// Ids whose text is not shown yet.
    pending: Vec<u32>,
}

impl Stream<'_> {
    /// Takes the next id and returns the text that is now complete, often empty for a part of a character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.pending.push(id);
        let text = self.text()?;
        let whole = text.as_ref().is_some_and(|t| !t.is_empty() && !t.ends_with(char::REPLACEMENT_CHARACTER));
        match text {
            Some(text) if whole => {
                self.context = std::mem::take(&mut self.pending);
                Ok(text)
            }
            _ if self.pending.len() >= MAX_PENDING => self.flush(),
            _ => Ok(String::new()),
        }
    }

    /// Returns what was held back, with U+FFFD for bytes that never became a character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn flush(&mut self) -> Result<String> {
        let text = match self.text()? {
            Some(text) => text,
            None => self.tokenizer.decode(&self.pending)?,
        };
        self.context = std::mem::take(&mut self.pending);
        Ok(text)
    }

    /// The text that the pending ids add to the context; `None` while they change how the context itself is decoded.
    fn text(&self) -> Result<Option<String>> {
        let shown = self.tokenizer.decode(&self.context)?;
        let all: Vec<u32> = self.context.iter().chain(&self.pending).copied().collect();
        Ok(self.tokenizer.decode(&all)?.strip_prefix(&shown).map(str::to_string))
    }
}
