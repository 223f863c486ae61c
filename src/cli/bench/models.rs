//! Which models a benchmark runs, and what fills their caches.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use specache::Engine;
use specache::device::ram;
use specache::error::{Error, Result};

use crate::cli::input;
use crate::cli::progress::say;
use crate::cli::size;

/// The trained model of this repository.
const RECALL: &str = "tests/fixtures/recall";
/// Its prompts, beside its folder.
const RECALL_PROMPTS: &str = "recall_prompts.json";
/// Tokens in the cache where nothing else is said.
const DEPTH: usize = 1024;

/// Random weights in the order of preference, with the free memory that they want: weights, caches of five modes and
/// room for others.
const SYNTHETIC: [(&str, u64); 3] =
    [("synthetic:llama-3.2-1b", 4 << 30), ("synthetic:tinyllama-1.1b", 3 << 30), ("synthetic:tiny", 0)];

/// A prompt for models that have no better one.
const PASSAGE: &str = "Decoding reads every weight and every pair of the cache once for each token, so its speed is that \
of memory. A cache of two bits is read in an eighth of the time, and the few pairs that matter most can be kept at full \
precision elsewhere, if only somebody knows early enough which they are. ";

/// The models that were asked for, or the usual ones.
pub fn chosen(asked: &[String]) -> Vec<String> {
    if !asked.is_empty() {
        return asked.to_vec();
    }
    let synthetic = synthetic().to_string();
    match recall() {
        Some(recall) => vec![recall.display().to_string(), synthetic],
        None => {
            say(format_args!("{RECALL}: not here and not in the source tree; benchmarking {synthetic} only"));
            vec![synthetic]
        }
    }
}

/// The recall model: from the current folder, or in the source tree.
fn recall() -> Option<PathBuf> {
    let source_tree = Path::new(env!("CARGO_MANIFEST_DIR")).join(RECALL);
    [PathBuf::from(RECALL), source_tree].into_iter().find(|dir| dir.join("config.json").exists())
}

/// The largest usual shape that memory allows.
pub fn synthetic() -> &'static str {
    let available = ram::available().unwrap_or(u64::MAX);
    let fits = SYNTHETIC.iter().position(|&(_, needed)| needed <= available).expect("the last one needs nothing");
    let ((first, needed), (chosen, _)) = (SYNTHETIC[0], SYNTHETIC[fits]);
    if fits > 0 {
        let (needed, available) = (size::show(needed), size::show(available));
        say(format_args!("{first} wants {needed} of free memory, {available} are there: taking {chosen}"));
    }
    chosen
}

/// What fills a cache.
pub enum Fill {
    /// A prompt, really prefilled, and what comes behind it.
    Prompt { tokens: Vec<u32>, next: Vec<u32> },
    /// Random pairs, and a token to begin with.
    Random { tokens: usize, first: u32 },
}

impl Fill {
    /// Tokens in the cache.
    pub fn depth(&self) -> usize {
        match self {
            Fill::Prompt { tokens, .. } => tokens.len(),
            Fill::Random { tokens, .. } => *tokens,
        }
    }
}

/// What fills the caches of a model, and `next` tokens behind that.
///
/// # Errors
/// [`Error::Model`] for a broken tokenizer or prompt file.
pub fn fill(engine: &Engine, model: &str, depth: Option<usize>, next: usize) -> Result<Fill> {
    let config = &engine.model().config;
    if engine.model().synthetic {
        return Ok(Fill::Random { tokens: depth.unwrap_or(DEPTH), first: config.bos_token_id.unwrap_or(0) });
    }
    let (ids, usual) = text(engine, model)?;
    let mut tokens = cycled(ids, depth.unwrap_or(usual) + next);
    let next = tokens.split_off(tokens.len() - next);
    Ok(Fill::Prompt { tokens, next })
}

/// Tokens of some text, and how many of them a prompt has where nothing else is said.
///
/// # Errors
/// As [`fill`].
pub fn text(engine: &Engine, model: &str) -> Result<(Vec<u32>, usize)> {
    let config = &engine.model().config;
    // 2^32 / golden ratio: neighbours are far apart.
    let scattered = || (0..997u32).map(|i| i.wrapping_mul(2_654_435_769) % config.vocab_size as u32).collect();
    if engine.model().synthetic {
        return Ok((scattered(), DEPTH));
    }
    if let Some(prompts) = recall_prompts(Path::new(model))? {
        let one = prompts.first().map_or(DEPTH, |prompt| prompt.ids.len());
        return Ok((prompts.into_iter().flat_map(|prompt| prompt.ids).collect(), one));
    }
    let ids = match input::tokenizer(model, config.vocab_size)? {
        Some(tokenizer) => tokenizer.encode(PASSAGE, false)?,
        None => scattered(),
    };
    Ok((ids, DEPTH))
}

/// A prompt of the recall model.
#[derive(Deserialize)]
struct RecallPrompt {
    ids: Vec<u32>,
}

/// The prompts of the recall model, if this is it and they are there.
fn recall_prompts(model: &Path) -> Result<Option<Vec<RecallPrompt>>> {
    if !model.ends_with("recall") {
        return Ok(None);
    }
    let file = model.with_file_name(RECALL_PROMPTS);
    let Ok(json) = std::fs::read(&file) else { return Ok(None) };
    serde_json::from_slice(&json).map(Some).map_err(|e| Error::model(&file, format!("not a list of prompts: {e}")))
}

/// The first `n` of the ids repeated without end.
pub fn cycled(ids: Vec<u32>, n: usize) -> Vec<u32> {
    ids.into_iter().cycle().take(n).collect()
}
