//! Generation: tokens are chosen, shown to the callback and fed, until something ends it.

use std::ffi::c_void;
use std::mem;

use super::engine::EngineObject;
use super::handles::{self, SessionHandle};
use super::logits::Lent;
use super::memory::set_if;
use super::session::{SessionObject, State};
use super::status::{Fail, Result, Status, guard};
use super::structs::{Sized32, TokenC};
use super::text::check_flags;
use crate::tokenizer::Stream;

const IGNORE_EOS: u32 = 1;
const NO_TEXT: u32 = 2;

/// Why a generation came to its end, as in the header.
#[derive(Clone, Copy)]
enum Stop {
    Error = -1,
    Length = 0,
    Eos = 1,
    Full = 2,
}

/// `specache_token_fn`.
pub type TokenFn = unsafe extern "C" fn(*mut c_void, *const TokenC) -> i32;

/// Who is shown the tokens.
struct Listener<'a> {
    callback: Option<TokenFn>,
    user_data: *mut c_void,
    text: Option<Stream<'a>>,
    /// Keeps its memory from token to token.
    piece: Vec<u8>,
}

impl<'a> Listener<'a> {
    /// Text is made where somebody takes it, and continues that of `tokens`.
    fn new(
        engine: &'a EngineObject,
        tokens: &[u32],
        flags: u32,
        callback: Option<TokenFn>,
        user_data: *mut c_void,
    ) -> Self {
        let wanted = callback.is_some() && flags & NO_TEXT == 0;
        let text = engine.tokenizer.as_ref().filter(|_| wanted).map(|tokenizer| tokenizer.stream(tokens));
        Listener { callback, user_data, text, piece: Vec::new() }
    }

    /// `ends`: the generation does with this token, which is no part of the text then.
    fn show(&mut self, id: u32, index: u64, is_eos: bool, ends: bool) -> Result<()> {
        let piece = match &mut self.text {
            Some(text) if !ends => text.push(id)?,
            _ => String::new(),
        };
        self.call(id, index, piece, is_eos)
    }

    /// Shows what was held back.
    fn finish(&mut self, index: u64) -> Result<()> {
        let rest = self.text.as_mut().map_or(Ok(String::new()), Stream::flush)?;
        if rest.is_empty() { Ok(()) } else { self.call(u32::MAX, index, rest, false) }
    }

    fn call(&mut self, id: u32, index: u64, piece: String, is_eos: bool) -> Result<()> {
        let Some(callback) = self.callback else { return Ok(()) };
        self.piece.clear();
        self.piece.extend_from_slice(piece.as_bytes());
        self.piece.push(0);
        let token = TokenC {
            id,
            index,
            text: self.piece.as_ptr().cast(),
            n_bytes: piece.len() as u64,
            is_eos: is_eos.into(),
            ..Sized32::defaults()
        };
        // SAFETY: the caller's function and what it asked to be called with; token and text live until it returns.
        match unsafe { callback(self.user_data, &token) } {
            0 => Ok(()),
            code => Err(Fail::new(Status::Cancelled, format!("cancelled: the callback returned {code}"))),
        }
    }
}

/// Up to `n_tokens` tokens; `generated` counts those that are chosen.
fn generate(
    object: &SessionObject,
    state: &mut State,
    n_tokens: u64,
    flags: u32,
    listener: &mut Listener,
    buffers: &mut Lent,
    generated: &mut u64,
) -> Result<Stop> {
    let eos = &object.engine.engine.model().config.eos_token_ids;
    // Where the latest logits are: at first the session's, then those of the latest step.
    let mut stepped = false;
    let result = loop {
        if *generated == n_tokens {
            break Ok(Stop::Length);
        }
        let mut next = || {
            object.check_cancel()?;
            if let Some(token) = state.chosen {
                let session = state.session()?;
                if session.n_tokens() == session.max_tokens() {
                    return Ok(Some(Stop::Full));
                }
                state.logits = None; // of a step that begins and fails there are none
                object.feed(state, token, buffers)?;
                stepped = true;
            }
            let token = match &state.logits {
                _ if stepped => buffers.sample(0, &mut state.sampler, &state.tokens)?,
                Some(first) => state.sampler.sample(first.get()?, &state.tokens)?,
                None => {
                    let why = "nothing to go on from: prefill, or feed a token with specache_session_step";
                    return Err(Fail::usage(why));
                }
            };
            state.chosen = Some(token);
            let index = mem::replace(generated, *generated + 1);
            let is_eos = eos.contains(&token);
            let ends = is_eos && flags & IGNORE_EOS == 0;
            listener.show(token, index, is_eos, ends)?;
            Ok(ends.then_some(Stop::Eos))
        };
        match next() {
            Ok(None) => {}
            Ok(Some(stop)) => break Ok(stop),
            Err(fail) => break Err(fail),
        }
    };
    if stepped && buffers.check(0).is_ok() {
        state.logits = Some(buffers.leave(0));
    }
    let stop = result?;
    listener.finish(*generated)?;
    Ok(stop)
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_session_generate(
    session: *mut SessionHandle,
    n_tokens: u64,
    flags: u32,
    on_token: Option<TokenFn>,
    user_data: *mut c_void,
    n_generated: *mut u64,
    stop: *mut i32,
) -> i32 {
    guard(|| {
        // SAFETY: the header's contract.
        unsafe { set_if(n_generated, 0, "n_generated") }?;
        // SAFETY: as above.
        unsafe { set_if(stop, Stop::Error as i32, "stop") }?;
        let object = handles::session(session)?;
        check_flags(flags, IGNORE_EOS | NO_TEXT, "SPECACHE_IGNORE_EOS and SPECACHE_NO_TEXT")?;
        let mut state = object.lock()?;
        state.sound()?; // its logits would give a token yet
        let held = state.tokens.len();
        let chosen = state.chosen;
        state.tokens.extend(chosen); // it was shown already
        let mut listener = Listener::new(&object.engine, &state.tokens, flags, on_token, user_data);
        state.tokens.truncate(held);
        let mut generated = 0;
        let result = match n_tokens {
            0 => listener.finish(0).map(|()| Stop::Length),
            _ => object.engine.with_buffers(1, |buffers| {
                generate(&object, &mut state, n_tokens, flags, &mut listener, buffers, &mut generated)
            }),
        };
        // SAFETY: as above.
        unsafe { set_if(n_generated, generated, "n_generated") }?;
        let reason = result?;
        // SAFETY: as above.
        unsafe { set_if(stop, reason as i32, "stop") }
    })
}
