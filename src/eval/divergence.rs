//! How far a KV mode's predictions are from those of `full`: KL divergence and agreement of the most likely token.

use super::lockstep::{self, Guesses, Step};
use crate::engine::Engine;
use crate::error::Result;
use crate::kv::{KvMode, KvOptions};
use crate::reference::kl_divergence;
use crate::sampler::argmax;

/// Every scored token of one window, for one variant.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Window {
    /// KL(full || variant) of each step, nats.
    pub kl: Vec<f32>,
    /// Steps in which both have the same most likely token.
    pub agreed: usize,
    /// How well `specache` guessed.
    pub guesses: Guesses,
}

/// The divergence of each of `variants` from `full` over one window: one `full` session beside theirs, fed the same tokens.
/// Scored are the decode steps, `ids.len() - prefill - 1`. `progress` gets the number of each step.
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
    let all = with_full(variants);
    let mut windows = vec![Window::default(); variants.len()];
    let sessions = lockstep::run(engine, &all, ids, prefill, false, |step: Step| {
        let full = step.logits(0)?;
        let best = argmax(full);
        for (i, window) in windows.iter_mut().enumerate() {
            let logits = step.logits(i + 1)?;
            window.kl.push(from_full(full, logits) as f32);
            window.agreed += usize::from(argmax(logits) == best);
        }
        progress(step.number);
        Ok(())
    })?;
    windows.iter_mut().zip(&sessions[1..]).for_each(|(window, session)| window.guesses = Guesses::of(session));
    Ok(windows)
}

/// KL(full || variant) of one row of logits each, nats. Rounding may leave a sum of zeros slightly below zero: it is zero.
pub fn from_full(full: &[f32], variant: &[f32]) -> f64 {
    kl_divergence(full, variant).max(0.0)
}

/// `full`, with the number type of the variants, before them.
pub(crate) fn with_full(variants: &[KvOptions]) -> Vec<KvOptions> {
    let dtype = variants.first().and_then(|kv| kv.dtype);
    let full = KvOptions { mode: KvMode::Full, dtype, ..KvOptions::default() };
    [&[full], variants].concat()
}

/// Figures over all windows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Scored tokens.
    pub tokens: usize,
    /// Mean KL divergence, nats.
    pub mean: f64,
    /// The middle one (nearest rank).
    pub median: f64,
    /// The 99th percentile (nearest rank): 1 % of the tokens are beyond it.
    pub p99: f64,
    /// The largest.
    pub max: f64,
    /// Share of tokens whose most likely next token is that of `full`.
    pub top1: f64,
    /// How well `specache` guessed.
    pub guesses: Guesses,
}

/// Sums windows up; `None` without any token.
pub fn summary(windows: &[Window]) -> Option<Summary> {
    let mut all: Vec<f64> = windows.iter().flat_map(|w| &w.kl).map(|&kl| f64::from(kl)).collect();
    let tokens = all.len();
    if tokens == 0 {
        return None;
    }
    all.sort_by(f64::total_cmp);
    let rank = |share: f64| all[((share * tokens as f64).ceil() as usize).clamp(1, tokens) - 1];
    let agreed: usize = windows.iter().map(|w| w.agreed).sum();
    Some(Summary {
        tokens,
        mean: all.iter().sum::<f64>() / tokens as f64,
        median: rank(0.5),
        p99: rank(0.99),
        max: all[tokens - 1],
        top1: agreed as f64 / tokens as f64,
        guesses: windows.iter().fold(Guesses::default(), |sum, w| sum.plus(w.guesses)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_by_hand() {
        let windows = [
            Window { kl: (1..=150).map(|i| i as f32).collect(), agreed: 150, guesses: Guesses { right: 3, of: 149 } },
            Window { kl: (151..=200).map(|i| i as f32).collect(), agreed: 20, guesses: Guesses { right: 4, of: 49 } },
        ];
        let s = summary(&windows).unwrap();
        assert_eq!((s.tokens, s.mean, s.median, s.p99, s.max, s.top1), (200, 100.5, 100.0, 198.0, 200.0, 0.85));
        assert_eq!(s.guesses, Guesses { right: 7, of: 198 });
        assert_eq!(summary(&[]), None);
    }
}
