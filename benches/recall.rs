//! How much of what was planted in its context does the recall model remember, per KV mode?
//!
//! ```text
//! python3 tools/recall/prompts.py -o target/recall.json
//! cargo bench --bench recall -- target/recall.json
//! ```
//!
//! Greedy; a prompt counts if all tokens of the answer's three words come out. Prints a Markdown table per length, and how
//! much of the selections delta prefetch finds in their slots.

use std::collections::BTreeMap;
use std::time::Instant;

use specache::device::DeviceOptions;
use specache::kv::{KvMode, KvOptions};
use specache::sampler::argmax;
use specache::session::Stats;
use specache::{Buffers, Engine, Next, Prompt, Result};

#[derive(serde::Deserialize)]
struct Case {
    length: usize,
    ids: Vec<u32>,
    answer: Vec<u32>,
}

/// What a set of options reached over the prompts of one length.
#[derive(Default)]
struct Score {
    right: usize,
    of: usize,
    hits: (u64, u64),
    accepted: (u64, u64),
}

impl Score {
    fn add(&mut self, right: bool, stats: &Stats) {
        self.right += usize::from(right);
        self.of += 1;
        for (hits, of) in &stats.hits {
            self.hits = (self.hits.0 + hits, self.hits.1 + of);
        }
        self.accepted = (self.accepted.0 + stats.accepted, self.accepted.1 + stats.compared);
    }
}

/// Greedy decoding of as many tokens as the answer has.
fn ask(engine: &Engine, kv: KvOptions, case: &Case, buffers: &mut Buffers) -> Result<(bool, Stats)> {
    let mut session = engine.session(kv, case.ids.len() + case.answer.len())?;
    let prompt = Prompt { session: &mut session, tokens: &case.ids };
    let mut token = argmax(&engine.prefill(&mut [prompt], buffers)?.remove(0)?);
    let mut said = vec![token];
    while said.len() < case.answer.len() {
        engine.decode(&mut [Next { session: &mut session, token }], buffers)?;
        token = argmax(buffers.logits(0)?);
        said.push(token);
    }
    Ok((said == case.answer, session.stats().clone()))
}

/// Steps behind each prompt over which delta prefetch is counted.
const DELTA_STEPS: usize = 64;

/// Share of the selected pairs that were in their slots already, per layer, over greedy decoding behind some prompts.
fn delta_saved(engine: &Engine, kv: KvOptions, cases: &[&Case], buffers: &mut Buffers) -> Result<Vec<String>> {
    let mut sums = vec![(0, 0); engine.model().config.n_layers];
    for case in cases {
        let mut session = engine.session(kv, case.ids.len() + DELTA_STEPS)?;
        let prompt = Prompt { session: &mut session, tokens: &case.ids };
        let mut token = argmax(&engine.prefill(&mut [prompt], buffers)?.remove(0)?);
        for _ in 0..DELTA_STEPS {
            engine.decode(&mut [Next { session: &mut session, token }], buffers)?;
            token = argmax(buffers.logits(0)?);
        }
        for (sum, (fetched, of)) in sums.iter_mut().zip(&session.stats().fetched) {
            *sum = (sum.0 + of - fetched, sum.1 + of);
        }
    }
    Ok(sums.into_iter().map(share).collect())
}

fn options() -> Vec<(String, KvOptions)> {
    let base = KvOptions::default();
    let mut all = vec![("full".to_string(), KvOptions { mode: KvMode::Full, ..base })];
    for bits in [1, 2] {
        for residual_len in [64, 128] {
            let kv = KvOptions { mode: KvMode::Kivi, bits, residual_len, ..base };
            all.push((format!("kivi {bits}-bit R={residual_len}"), kv));
        }
        for top_k in [0, 4, 8, 16, 32, 64, 128] {
            let kv = KvOptions { bits, top_k, ..base };
            all.push((format!("specache {bits}-bit R=64 k={top_k}"), kv));
        }
        for top_k in [16, 64] {
            let kv = KvOptions { mode: KvMode::Fetch, bits, top_k, ..base };
            all.push((format!("fetch {bits}-bit R=64 k={top_k}"), kv));
        }
    }
    all
}

fn share((part, of): (u64, u64)) -> String {
    if of == 0 { "n/a".into() } else { format!("{:.3}", part as f64 / of as f64) }
}

fn main() -> Result<()> {
    // `cargo bench` passes --bench, and runs every bench; without a prompts file there is nothing to do here.
    let Some(file) = std::env::args().skip(1).find(|a| !a.starts_with("--")) else {
        println!("recall: no prompts given; see the head of benches/recall.rs");
        return Ok(());
    };
    let text = std::fs::read(&file).map_err(|e| specache::Error::io(&file, e))?;
    let cases: Vec<Case> = serde_json::from_slice(&text).map_err(|e| specache::Error::Usage(format!("{file}: {e}")))?;
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/recall");
    let engine = Engine::load(model, &DeviceOptions::default())?;
    let mut buffers = Buffers::default();
    let mut by_length: BTreeMap<usize, Vec<&Case>> = BTreeMap::new();
    cases.iter().for_each(|case| by_length.entry(case.length).or_default().push(case));

    for (length, cases) in by_length {
        let mean = cases.iter().map(|c| c.ids.len()).sum::<usize>() as f64 / cases.len() as f64;
        println!("\n### about {length} tokens (mean {mean:.0}, {} prompts)\n", cases.len());
        println!("| KV | exact match | right | hit rate | acceptance |\n|---|---|---|---|---|");
        for (name, kv) in options() {
            let start = Instant::now();
            let mut score = Score::default();
            for case in &cases {
                let (right, stats) = ask(&engine, kv, case, &mut buffers)?;
                score.add(right, &stats);
            }
            let Score { right, of, hits, accepted } = score;
            let rate = right as f64 / of as f64;
            println!("| {name} | {rate:.3} | {right}/{of} | {} | {} |", share(hits), share(accepted));
            eprintln!("{length} {name}: {:.1} s", start.elapsed().as_secs_f64());
        }
        let cases = &cases[..cases.len().min(16)];
        println!("\nDelta prefetch saves, by layer ({} prompts, {DELTA_STEPS} steps each):\n", cases.len());
        println!(
            "| KV | {} |",
            (0..engine.model().config.n_layers).map(|l| format!("layer {l}")).collect::<Vec<_>>().join(" | ")
        );
        println!("|---{}|", "|---:".repeat(engine.model().config.n_layers));
        for mode in [KvMode::SpeCache, KvMode::Fetch] {
            for (bits, top_k) in [(1, 16), (1, 64), (2, 16), (2, 64)] {
                let kv = KvOptions { mode, bits, top_k, ..KvOptions::default() };
                let saved = delta_saved(&engine, kv, cases, &mut buffers)?;
                println!("| {} {bits}-bit k={top_k} | {} |", mode.name(), saved.join(" | "));
            }
        }
    }
    Ok(())
}
