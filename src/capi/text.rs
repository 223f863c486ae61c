//! Text to tokens and back, and conversations to text.

use std::ffi::c_char;

use super::engine::EngineObject;
use super::handles::{self, EngineHandle};
use super::memory::{c_text, give, give_text, slice, text};
use super::status::{Fail, Result, guard};
use super::structs::ChatMessage;
use crate::chat::Message;
use crate::tokenizer::Tokenizer;

const ADD_SPECIAL: u32 = 1;

impl EngineObject {
    pub(super) fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            let name = &self.engine.model().name;
            Fail::usage(format!("{name} has no tokenizer.json, so text cannot be used; use token ids"))
        })
    }

    /// Messages as the model's chat template writes them.
    ///
    /// # Safety
    /// `messages` is NULL or points to so many messages.
    pub(super) unsafe fn render(&self, messages: *const ChatMessage, n: usize, for_answer: bool) -> Result<String> {
        let name = &self.engine.model().name;
        let template = self.chat.as_ref().ok_or_else(|| {
            Fail::usage(format!(
                "{name} has no chat template, neither chat_template.jinja nor one in tokenizer_config.json"
            ))
        })?;
        // SAFETY: the caller's promise.
        let messages = unsafe { slice(messages, n, "messages") }?;
        let message = |m: &ChatMessage| {
            // SAFETY: the header's contract.
            let (role, content) = unsafe { (c_text(m.role, "a message's role")?, c_text(m.content, "its content")?) };
            Ok(Message { role, content })
        };
        let messages = messages.iter().map(message).collect::<Result<Vec<_>>>()?;
        Ok(template.render(&messages, for_answer)?)
    }

    /// Token ids of a text.
    pub(super) fn encode(&self, text: &str, flags: u32) -> Result<Vec<u32>> {
        check_flags(flags, ADD_SPECIAL, "SPECACHE_ADD_SPECIAL")?;
        Ok(self.tokenizer()?.encode(text, flags & ADD_SPECIAL != 0)?)
    }
}

/// Flags that a later version may know are not ignored.
pub(super) fn check_flags(flags: u32, known: u32, names: &str) -> Result<()> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Fail::usage(format!("flags: {unknown:#x} is unknown; only {names} can be set"))),
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_tokenize(
    engine: *mut EngineHandle,
    text: *const c_char,
    n_bytes: usize,
    flags: u32,
    ids: *mut u32,
    capacity: usize,
    n: *mut usize,
) -> i32 {
    guard(|| {
        let engine = handles::engine(engine)?;
        // SAFETY: the header's contract.
        let text = unsafe { self::text(text, n_bytes, "text") }?;
        let encoded = engine.encode(text, flags)?;
        // SAFETY: as above.
        unsafe { give(&encoded, ids, capacity, n, "ids") }
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_detokenize(
    engine: *mut EngineHandle,
    ids: *const u32,
    n_ids: usize,
    text: *mut c_char,
    capacity: usize,
    n: *mut usize,
) -> i32 {
    guard(|| {
        let engine = handles::engine(engine)?;
        // SAFETY: the header's contract.
        let ids = unsafe { slice(ids, n_ids, "ids") }?;
        let vocab = engine.engine.model().config.vocab_size;
        if let Some(i) = ids.iter().position(|&id| id as usize >= vocab) {
            let (id, last) = (ids[i], vocab - 1);
            return Err(Fail::usage(format!("ids: entry {i} is {id}, beyond the vocabulary, which ends at {last}")));
        }
        let decoded = engine.tokenizer()?.decode(ids)?;
        // SAFETY: as above.
        unsafe { give_text(&decoded, text, capacity, n) }
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_chat_prompt(
    engine: *mut EngineHandle,
    messages: *const ChatMessage,
    n_messages: usize,
    add_generation_prompt: i32,
    text: *mut c_char,
    capacity: usize,
    n: *mut usize,
) -> i32 {
    guard(|| {
        let engine = handles::engine(engine)?;
        // SAFETY: the header's contract.
        let rendered = unsafe { engine.render(messages, n_messages, add_generation_prompt != 0) }?;
        // SAFETY: as above.
        unsafe { give_text(&rendered, text, capacity, n) }
    })
}
