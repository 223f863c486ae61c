//! Teacher forcing: the logits of a given token sequence, step by step (method.md, "Teacher forcing").

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::kv::KvOptions;
use crate::session::{Buffers, Next, Prompt, Session};

/// What to force.
#[derive(Clone, Copy, Debug)]
pub struct Forced<'a> {
    /// All tokens; the last one is never fed.
    pub ids: &'a [u32],
    /// Length of the prompt, `1 <= prefill < ids.len()`.
    pub prefill: usize,
    /// Speculative tokens, T'_2 first; `None`: the model's own.
    pub speculative: Option<&'a [u32]>,
    /// Keep the selections.
    pub trace: bool,
}

/// Feeds the tokens and gives `row` the `ids.len() - prefill` rows of logits in order: the first comes from the prompt's
/// last position, one more from each fed token. Returns the session with its figures and its trace.
///
/// # Errors
/// [`Error::Usage`] for a prompt length or a list of speculative tokens that does not fit; else as [`Engine::prefill`]
/// and [`Engine::decode`], and whatever `row` returns.
pub fn forced(
    engine: &Engine,
    kv: KvOptions,
    forced: Forced,
    mut row: impl FnMut(&[f32]) -> Result<()>,
) -> Result<Session> {
    let Forced { ids, prefill, speculative, trace } = forced;
    if prefill == 0 || prefill >= ids.len() {
        let most = ids.len().saturating_sub(1);
        return Err(Error::Usage(format!(
            "--prefill {prefill}: must be from 1 to {most}, one less than the {} tokens given",
            ids.len()
        )));
    }
    engine.context().check_tokens(ids)?;
    let steps = ids.len() - prefill - 1;
    let mut session = engine.session(kv, ids.len())?;
    if let Some(tokens) = speculative {
        if tokens.len() < steps {
            return Err(Error::Usage(format!(
                "--spec-tokens: {} tokens for {steps} decode steps; one for each step is needed, T'_2 first",
                tokens.len()
            )));
        }
        engine.context().check_tokens(tokens)?;
        session.force_speculative(tokens.iter().copied());
    }
    if trace {
        session.keep_trace();
    }
    let mut buffers = Buffers::default();
    let prompt = Prompt { session: &mut session, tokens: &ids[..prefill] };
    let first = engine.prefill(&mut [prompt], &mut buffers)?.remove(0)?;
    row(&first)?;
    for &token in &ids[prefill..ids.len() - 1] {
        engine.decode(&mut [Next { session: &mut session, token }], &mut buffers)?;
        row(buffers.logits(0)?)?;
    }
    Ok(session)
}
