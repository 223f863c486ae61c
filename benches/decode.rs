//! A whole decode step against a plain read of as many bytes, and a prefill against the `gemm` crate on the same shapes.
//!
//! `cargo bench --bench decode [-- SHAPE [STEPS]]`: the two sides take turns, step by step, and the median of the ratios
//! counts: on a shared machine, only neighbours in time can be compared.

use std::time::Instant;

use gemm::Parallelism;
use specache::cpu::bandwidth::Reader;
use specache::device::DeviceOptions;
use specache::kv::{KvMode, KvOptions};
use specache::{Buffers, Engine, Next, Prompt, Result};

/// Tokens in the cache: short, so that the weights are nearly all that is read.
const CONTEXT: usize = 64;
/// Rows of a prefill.
const ROWS: usize = 512;

fn seconds(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn decode(engine: &Engine, reader: &Reader, steps: usize) -> Result<()> {
    let bytes = engine.model().weights.bytes(engine.model().config.tie_word_embeddings) as usize;
    println!("decode, {CONTEXT} tokens in the cache, {bytes} bytes of weights; {steps} pairs of a read and a step");
    println!("{:>10} {:>12} {:>12} {:>18} {:>8}", "mode", "ms a step", "GB/s", "a plain read GB/s", "share");
    for mode in [KvMode::Full, KvMode::SpeCache] {
        let mut session = engine.session(KvOptions { mode, ..KvOptions::default() }, CONTEXT + steps + 4)?;
        engine.device().run(|| session.fill_synthetic(CONTEXT, 1))?;
        let mut buffers = Buffers::default();
        let (mut step_s, mut read_s) = (Vec::new(), Vec::new());
        for step in 0..steps + 2 {
            let read = engine.device().run(|| reader.seconds(bytes));
            let mut done = Ok(());
            let next = Next { session: &mut session, token: step as u32 };
            let took = seconds(|| done = engine.decode(&mut [next], &mut buffers));
            done?;
            // The first steps warm up: the pre-decode is one of them.
            if step >= 2 {
                step_s.push(took);
                read_s.push(read);
            }
        }
        let shares = read_s.iter().zip(&step_s).map(|(read, step)| read / step).collect();
        let (step, read) = (median(step_s), median(read_s));
        let gbps = |s: f64| bytes as f64 / s / 1e9;
        let share = 100.0 * median(shares);
        println!("{:>10} {:>12.1} {:>12.1} {:>18.1} {share:>6.0} %", mode.name(), step * 1e3, gbps(step), gbps(read));
    }
    Ok(())
}

/// Seconds of the gemm crate for all products of a prefill of [`ROWS`] rows, with weights in f32.
fn gemm_seconds(engine: &Engine, w: &[f32], x: &[f32], out: &mut [f32]) -> f64 {
    let config = &engine.model().config;
    let layer = &engine.model().weights.layers[0];
    let products = [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down];
    seconds(|| {
        for linear in (0..config.n_layers).flat_map(|_| products) {
            let (n, k) = (linear.weight.rows(), linear.weight.cols());
            direct(x, w, out, n, k, engine.device().threads());
        }
    })
}

/// `out[ROWS, n] = x[ROWS, k] w[n, k]^T`.
#[allow(unsafe_code)]
fn direct(x: &[f32], w: &[f32], out: &mut [f32], n: usize, k: usize, threads: usize) {
    assert!(x.len() >= ROWS * k && w.len() >= n * k && out.len() >= ROWS * n, "direct: shapes");
    let (x, w, out, ks, ns) = (x.as_ptr(), w.as_ptr(), out.as_mut_ptr(), k as isize, n as isize);
    // SAFETY: the sizes are asserted.
    unsafe {
        let parallelism = Parallelism::Rayon(threads);
        gemm::gemm(ROWS, n, k, out, 1, ns, false, x, 1, ks, w, ks, 1, 0.0, 1.0, false, false, false, parallelism);
    }
}

fn prefill(engine: &Engine, rounds: usize) -> Result<()> {
    let config = &engine.model().config;
    let widest = config.intermediate_size.max(config.hidden_size);
    let (w, x) = (vec![0.01f32; widest * config.hidden_size], vec![0.5f32; ROWS * widest]);
    let mut out = vec![0f32; ROWS * widest];
    let tokens: Vec<u32> = (0..ROWS as u32).collect();
    let (mut prefill_s, mut gemm_s) = (Vec::new(), Vec::new());
    let mut buffers = Buffers::default();
    for round in 0..rounds + 1 {
        let direct = engine.device().run(|| gemm_seconds(engine, &w, &x, &mut out));
        let mut session = engine.session(KvOptions::default(), ROWS + 1)?;
        let mut result = Ok(vec![]);
        let prompt = Prompt { session: &mut session, tokens: &tokens };
        let took = seconds(|| result = engine.prefill(&mut [prompt], &mut buffers));
        result?.remove(0)?;
        if round > 0 {
            prefill_s.push(took);
            gemm_s.push(direct);
        }
    }
    let share = 100.0 * median(gemm_s.iter().zip(&prefill_s).map(|(gemm, prefill)| gemm / prefill).collect());
    let layers = engine.model().weights.layers.iter();
    let products = layers.flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]);
    let flop = 2.0 * ROWS as f64 * products.map(|l| (l.weight.rows() * l.weight.cols()) as f64).sum::<f64>();
    let gflops = |s: f64| flop / s / 1e9;
    let (prefill, direct) = (median(prefill_s), median(gemm_s));
    println!("prefill of {ROWS} tokens, everything included: {:.0} GFLOP/s of its products", gflops(prefill));
    println!("gemm crate, f32 weights, products alone: {:.0} GFLOP/s; share {share:.0} %", gflops(direct));
    Ok(())
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let shape = args.next().unwrap_or_else(|| "llama-3.2-1b".into());
    let steps = args.next().and_then(|n| n.parse().ok()).unwrap_or(30);
    let engine = Engine::load(&format!("synthetic:{shape}"), &DeviceOptions::default())?;
    println!("synthetic:{shape}, bf16, on {}", engine.device().describe());
    let reader = engine.device().run(Reader::new)?;
    decode(&engine, &reader, steps)?;
    prefill(&engine, 5)
}
