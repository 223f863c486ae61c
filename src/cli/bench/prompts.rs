//! How fast each mode takes a prompt.

use std::time::Instant;

use specache::error::{Error, Result};
use specache::kv::KvOptions;
use specache::{Buffers, Engine, Prompt, Session};

use super::models;
use crate::cli::args::BenchArgs;
use crate::cli::progress::Progress;

/// What was measured with one model, prompt and batch.
pub struct PromptResult {
    pub model: String,
    /// Tokens of each prompt.
    pub tokens: usize,
    /// Prompts of a call.
    pub batch: usize,
    pub modes: Vec<PromptMode>,
}

/// What was measured with one mode.
pub struct PromptMode {
    pub kv: KvOptions,
    /// Seconds from the call to the logits of all prompts, in each repetition.
    pub seconds: Vec<f64>,
}

/// All modes, in turns.
pub fn bench(
    args: &BenchArgs,
    engine: &Engine,
    model: &str,
    tokens: usize,
    batch: usize,
    progress: &mut Progress,
) -> Result<PromptResult> {
    let ids = models::cycled(models::text(engine, model)?.0, tokens);
    let mut modes: Vec<PromptMode> =
        args.kv.iter().map(|&mode| PromptMode { kv: args.tuning.options(mode), seconds: Vec::new() }).collect();
    super::decode::warn_beyond_training(engine, tokens);
    progress.announce(format_args!("{model}: prompts of {tokens} tokens, batch {batch}"));
    let mut buffers = Buffers::default();
    // The first round sizes the buffers and warms up; it does not count.
    for repetition in 0..=args.repetitions {
        for mode in &mut modes {
            let what = format!("prompt of {tokens} tokens, {}", mode.kv.mode.name());
            match repetition {
                0 => progress.show(format_args!("{model}: {what}, to warm up")),
                _ => progress.show(format_args!("{model}: {what}, {repetition} of {}", args.repetitions)),
            }
            let seconds = once(engine, mode.kv, &ids, batch, &mut buffers)?;
            if repetition > 0 {
                mode.seconds.push(seconds);
            }
        }
    }
    Ok(PromptResult { model: engine.model().name.clone(), tokens, batch, modes })
}

/// Seconds that one call with `batch` prompts takes.
fn once(engine: &Engine, kv: KvOptions, ids: &[u32], batch: usize, buffers: &mut Buffers) -> Result<f64> {
    let room = ids.len().checked_add(1).ok_or_else(|| Error::Usage("-p: too many tokens".into()))?;
    let (plan, all) = (engine.plan(&kv, room)?, |bytes: u64| bytes.saturating_mul(batch as u64));
    let what = format!("a batch of {batch} KV caches of {room} tokens each (-b, -p)");
    // Before the first is made: what it has been granted shows in free memory only when it is written.
    drop(engine.device().grant(all(plan.device()), all(plan.host), &what)?);
    let mut sessions = (0..batch).map(|_| engine.session(kv, room)).collect::<Result<Vec<Session>>>()?;
    let mut prompts: Vec<Prompt> = sessions.iter_mut().map(|session| Prompt { session, tokens: ids }).collect();
    let start = Instant::now();
    engine.prefill(&mut prompts, buffers)?.into_iter().try_for_each(|logits| logits.map(drop))?;
    Ok(start.elapsed().as_secs_f64())
}
