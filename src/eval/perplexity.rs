//! Perplexity: `exp` of the mean negative log-likelihood of a text's tokens, each given those before it in its window.

use super::lockstep::{self, Guesses, Step};
use crate::engine::Engine;
use crate::error::Result;
use crate::kv::KvOptions;

/// `-ln softmax(logits)[target]` in nats, in f64; `logits` is `[vocab]`.
pub fn negative_log_likelihood(logits: &[f32], target: u32) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    max + sum.ln() - f64::from(logits[target as usize])
}

/// One window, for one variant.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Window {
    /// The sum of the negative log-likelihoods of the scored tokens, nats.
    pub nll: f64,
    /// How well `specache` guessed.
    pub guesses: Guesses,
}

/// One window for each of `variants`, summed over the `ids.len() - prefill - 1` tokens
/// that decode steps predict ([`lockstep::run`]). `progress` gets the number of each step.
///
/// # Errors
/// As [`lockstep::run`].
pub fn window(
    engine: &Engine,
    variants: &[KvOptions],
    ids: &[u32],
    prefill: usize,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Window>> {
    let mut windows = vec![Window::default(); variants.len()];
    let sessions = lockstep::run(engine, variants, ids, prefill, false, |step: Step| {
        for (i, window) in windows.iter_mut().enumerate() {
            window.nll += negative_log_likelihood(step.logits(i)?, step.target);
        }
        progress(step.number);
        Ok(())
    })?;
    windows.iter_mut().zip(&sessions).for_each(|(window, session)| window.guesses = Guesses::of(session));
    Ok(windows)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// softmax(ln 1, ln 2, ln 5) = 1/8, 2/8, 5/8.
    #[test]
    fn likelihoods_by_hand() {
        let logits = [1f32, 2.0, 5.0].map(f32::ln);
        for (target, p) in [(0, 0.125f64), (1, 0.25), (2, 0.625)] {
            assert!((negative_log_likelihood(&logits, target) + p.ln()).abs() < 1e-6);
        }
        // A shift changes nothing, also one at which exp would overflow.
        let far = logits.map(|x| x + 1000.0);
        assert!((negative_log_likelihood(&far, 2) + 0.625f64.ln()).abs() < 1e-4);
    }
}
