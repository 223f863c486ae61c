//! One window through several KV options at once: the same tokens, side by side in one batch, so that the weights are read
//! once for all of them and rows of logits can be compared without being kept.

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::kv::KvOptions;
use crate::session::{Buffers, Next, Prompt, Session};

/// One decode step of all sessions.
pub struct Step<'a> {
    /// The token that comes next in the window: what the logits are scored against.
    pub target: u32,
    /// How many steps of the window are done, this one among them.
    pub number: usize,
    /// In the order of the options.
    pub sessions: &'a [Session],
    buffers: &'a Buffers,
}

impl Step<'_> {
    /// The logits `[vocab]` of session `i`.
    ///
    /// # Errors
    /// As [`Buffers::logits`].
    pub fn logits(&self, i: usize) -> Result<&[f32]> {
        self.buffers.logits_on_host(i)
    }
}

/// How many of the speculative tokens of some steps were the text's own next ones. A text that the model did not write itself is
/// guessed less well than its own answers, and what is prefetched for a wrong guess fits less well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guesses {
    /// Those that were right.
    pub right: u64,
    /// Those that could be compared; 0 in modes that guess nothing.
    pub of: u64,
}

impl Guesses {
    /// Those of a session's life.
    pub fn of(session: &Session) -> Guesses {
        Guesses { right: session.stats().accepted, of: session.stats().compared }
    }

    /// Together with others.
    pub fn plus(self, other: Guesses) -> Guesses {
        Guesses { right: self.right + other.right, of: self.of + other.of }
    }

    /// The share that was right.
    pub fn acceptance(self) -> Option<f64> {
        (self.of > 0).then(|| self.right as f64 / self.of as f64)
    }
}

/// Prefills `ids[..prefill]` into a session for each of `variants`, then feeds `ids[prefill]` to the last but one of the ids,
/// and gives each step to `see`: the targets are `ids[prefill + 1..]`, each predicted by a decode step. (The token at
/// `prefill` is predicted by the prefill, which is exact in every mode.) `watch`: keep what attention saw
/// ([`Session::keep_attention`]).
///
/// # Errors
/// [`Error::Usage`] for a prompt length that does not fit; else as [`Engine::prefill`] and [`Engine::decode`], and whatever
/// `see` returns.
pub fn run(
    engine: &Engine,
    variants: &[KvOptions],
    ids: &[u32],
    prefill: usize,
    watch: bool,
    mut see: impl FnMut(Step) -> Result<()>,
) -> Result<Vec<Session>> {
    if prefill == 0 || prefill + 2 > ids.len() {
        return Err(Error::Usage(format!("a prompt of {prefill} of {} tokens leaves nothing to score", ids.len())));
    }
    let mut buffers = Buffers::default();
    let mut sessions = variants.iter().map(|&kv| engine.session(kv, ids.len())).collect::<Result<Vec<Session>>>()?;
    for session in &mut sessions {
        // One after the other: a prefill needs memory of its own for as long as it lasts.
        engine.prefill(&mut [Prompt { session, tokens: &ids[..prefill] }], &mut buffers)?.remove(0)?;
        if watch {
            session.keep_attention()?;
        }
    }
    for (step, pair) in ids[prefill..].windows(2).enumerate() {
        let (token, target) = (pair[0], pair[1]);
        let mut batch: Vec<Next> = sessions.iter_mut().map(|session| Next { session, token }).collect();
        engine.decode(&mut batch, &mut buffers)?;
        drop(batch);
        (0..sessions.len()).try_for_each(|i| buffers.logits(i).map(drop))?;
        see(Step { target, number: step + 1, sessions: &sessions, buffers: &buffers })?;
    }
    Ok(sessions)
}
