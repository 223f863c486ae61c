//! A prompt's greedy continuation: what needles and tasks are judged by.

use crate::engine::Engine;
use crate::error::Result;
use crate::kv::KvOptions;
use crate::sampler::argmax;
use crate::session::{Buffers, Next, Prompt};

/// When an answer ends.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// Most tokens.
    pub most: usize,
    /// Tokens that end it; they are no part of it.
    pub stop: Vec<u32>,
    /// The first token is none of `stop`.
    pub not_empty: bool,
}

/// How far an answer is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum At {
    /// Share of the prompt's prefill that is done.
    Prefill(f64),
    /// Tokens that are said.
    Token(usize),
}

/// Decodes greedily behind `prompt`; `tell` hears how far it is.
///
/// # Errors
/// As [`Engine::session`], [`Engine::prefill`] and [`Engine::decode`].
pub fn greedy(
    engine: &Engine,
    kv: KvOptions,
    prompt: &[u32],
    limits: &Limits,
    tell: &mut (dyn FnMut(At) + Send),
) -> Result<Vec<u32>> {
    tell(At::Prefill(0.0));
    let mut buffers = Buffers::default();
    let mut session = engine.session(kv, prompt.len().saturating_add(limits.most))?;
    let prompts = &mut [Prompt { session: &mut session, tokens: prompt }];
    let mut tell_share = |share| tell(At::Prefill(share));
    let mut logits = engine.prefill_telling(prompts, &mut buffers, &mut tell_share)?.remove(0)?;
    if limits.not_empty {
        // A configuration may name ids beyond the vocabulary; no token is one of them.
        for &id in &limits.stop {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    let mut token = argmax(&logits);
    let mut said = Vec::new();
    while said.len() < limits.most && !limits.stop.contains(&token) {
        said.push(token);
        tell(At::Token(said.len()));
        if said.len() == limits.most {
            break;
        }
        engine.decode(&mut [Next { session: &mut session, token }], &mut buffers)?;
        token = buffers.argmax(0)?;
    }
    Ok(said)
}
