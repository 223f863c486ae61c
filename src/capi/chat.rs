//! Conversations on one cache: of each turn only what is new is prefilled.

use super::engine::EngineObject;
use super::handles::{self, SessionHandle};
use super::memory::set_if;
use super::session::State;
use super::status::{Result, guard};
use super::structs::ChatMessage;
use crate::kv::KvMode;

/// The text that a session's first tokens are.
#[derive(Clone)]
pub(super) struct Conversation {
    text: String,
    pub n_tokens: usize,
}

impl State {
    /// The text of all that the session holds, and of a token that was shown and not fed, if its beginning is known.
    fn text(&self, engine: &EngineObject, shown: Option<u32>) -> Result<Option<String>> {
        let Some(Conversation { text, n_tokens }) = &self.conversation else { return Ok(None) };
        let (prompt, answer) = self.tokens.split_at(*n_tokens);
        let mut stream = engine.tokenizer()?.stream(prompt);
        let mut text = text.clone();
        for &id in answer.iter().chain(&shown) {
            text.push_str(&stream.push(id)?);
        }
        text.push_str(&stream.flush()?);
        Ok(Some(text))
    }

    /// How many tokens stay, and what comes behind them, for the session to hold `text`, whose tokens are `ids`. Usually all
    /// stay: the ids begin with them, or, where the tokenizer would have cut an answer differently than the model wrote it,
    /// the text begins with theirs. Where a template rewrites what was said, the common beginning stays.
    fn split(&self, engine: &EngineObject, text: &str, ids: &[u32], shown: Option<u32>) -> Result<(usize, Vec<u32>)> {
        let n = self.tokens.len();
        if ids.len() > n && ids.starts_with(&self.tokens) && shown.is_none_or(|token| ids[n] == token) {
            return Ok((n, ids[n..].to_vec()));
        }
        let held = self.text(engine, shown)?;
        let rest = held.as_deref().and_then(|held| text.strip_prefix(held));
        if let Some(rest) = rest.filter(|rest| n > 0 && !rest.is_empty()) {
            return Ok((n, shown.into_iter().chain(engine.encode(rest, 0)?).collect()));
        }
        // The last token is always fed: what follows it is what is asked for.
        let common = self.tokens.iter().zip(ids).take_while(|(a, b)| a == b).count().min(ids.len().saturating_sub(1));
        // Whose 16-bit pairs are gone cannot go back.
        let keep = if self.kv().mode == KvMode::Kivi { 0 } else { common };
        Ok((keep, ids[keep..].to_vec()))
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_session_prefill_chat(
    session: *mut SessionHandle,
    messages: *const ChatMessage,
    n_messages: usize,
    n_kept: *mut u64,
) -> i32 {
    guard(|| {
        // SAFETY: the header's contract.
        unsafe { set_if(n_kept, 0, "n_kept") }?;
        let object = handles::session(session)?;
        let engine = &object.engine;
        // SAFETY: as above.
        let text = unsafe { engine.render(messages, n_messages, true) }?;
        let ids = engine.encode(&text, 0)?;
        let mut state = object.lock()?;
        let state = &mut *state;
        object.check_cancel()?;
        state.sound()?; // before anything of it goes
        engine.engine.context().check_tokens(&ids)?;
        // Not the token that ended an answer: the template writes its own.
        let eos = &engine.engine.model().config.eos_token_ids;
        let shown = state.chosen.filter(|token| !eos.contains(token));
        let (keep, rest) = state.split(engine, &text, &ids, shown)?;
        if keep == 0 && !state.tokens.is_empty() {
            state.session()?.forget()?;
            state.forget(0);
        } else if keep < state.tokens.len() {
            state.session()?.truncate(keep)?;
            state.forget(keep);
        }
        object.feed_prompt(state, &rest)?;
        state.conversation = Some(Conversation { text, n_tokens: state.tokens.len() });
        // SAFETY: as above.
        unsafe { set_if(n_kept, keep as u64, "n_kept") }
    })
}
