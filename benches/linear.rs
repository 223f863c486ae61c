//! Linear layers at the shapes of Llama 3.2 1B: decode against the machine's read bandwidth, prefill against the rate of
//! the `gemm` crate with weights that are f32 already. `cargo bench --bench linear [-- THREADS [ISA]]`; a minute.

use std::time::Instant;

use gemm::Parallelism;
use specache::cpu::linear::{Part, Path, project, project_add, swiglu};
use specache::cpu::{Isa, bandwidth};
use specache::device::map::Bytes;
use specache::model::{Dtype, Linear, Matrix};

const HIDDEN: usize = 2048;
const KV: usize = 512;
const INTERMEDIATE: usize = 8192;
const VOCAB: usize = 128_256;
/// 16 layers are 1.9 GB, so none of it is still in a cache when its turn comes again.
const LAYERS: usize = 16;

struct Layer {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    gate: Linear,
    up: Linear,
    down: Linear,
}

struct Weights {
    layers: Vec<Layer>,
    head: Linear,
}

/// Random bf16 of size 2^-7 .. 2^-5.
fn linear(n: usize, k: usize, seed: u64) -> Linear {
    let mut state = seed | 1;
    let bytes = Bytes::filled(n * k * 2, |bytes| {
        for eight in bytes.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let bits = (state ^ (state >> 29)) & 0x80ff_80ff_80ff_80ff | 0x3c00_3c00_3c00_3c00;
            eight.copy_from_slice(&bits.to_le_bytes());
        }
    });
    Linear { weight: Matrix::new(bytes.expect("memory for the weights"), Dtype::Bf16, n, k), bias: None }
}

fn weights() -> Weights {
    let layer = |i: u64| Layer {
        q: linear(HIDDEN, HIDDEN, i),
        k: linear(KV, HIDDEN, i),
        v: linear(KV, HIDDEN, i + 1),
        o: linear(HIDDEN, HIDDEN, i + 1),
        gate: linear(INTERMEDIATE, HIDDEN, i),
        up: linear(INTERMEDIATE, HIDDEN, i + 1),
        down: linear(HIDDEN, INTERMEDIATE, i),
    };
    Weights { layers: (0..LAYERS as u64).map(|i| layer(1 + 2 * i)).collect(), head: linear(VOCAB, HIDDEN, 99) }
}

/// Activations and outputs of all operations.
struct Buffers {
    x: Vec<f32>,
    wide: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    hidden: Vec<f32>,
    logits: Vec<f32>,
}

impl Buffers {
    fn new(rows: usize, logits: bool) -> Buffers {
        let ramp = |n: usize| (0..n).map(|i| (i % 17) as f32 / 16.0 - 0.5).collect();
        Buffers {
            x: ramp(rows * HIDDEN),
            wide: ramp(rows * INTERMEDIATE),
            q: vec![0.0; rows * HIDDEN],
            k: vec![0.0; rows * KV],
            v: vec![0.0; rows * KV],
            hidden: vec![0.0; rows * HIDDEN],
            logits: vec![0.0; if logits { rows * VOCAB } else { 0 }],
        }
    }
}

const NAMES: [&str; 5] = ["qkv", "o", "gate up", "down", "lm head"];

/// Numbers of the weights of each operation, one layer.
fn sizes() -> [usize; 5] {
    [(HIDDEN + 2 * KV) * HIDDEN, HIDDEN * HIDDEN, 2 * INTERMEDIATE * HIDDEN, HIDDEN * INTERMEDIATE, VOCAB * HIDDEN]
}

/// Seconds that `run` takes.
fn seconds(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

/// The smaller numbers of the two.
fn least(a: [f64; 5], b: [f64; 5]) -> [f64; 5] {
    std::array::from_fn(|i| a[i].min(b[i]))
}

/// One pass over some layers (and the head, if there is room for logits): seconds of each operation in the layer where
/// it was fastest, as other users of the machine can only slow it down. Each layer's weights come from memory.
fn pass(isa: Isa, path: Path, rows: usize, layers: &[Layer], head: &Linear, b: &mut Buffers) -> [f64; 5] {
    let mut best = [f64::INFINITY; 5];
    for l in layers {
        let qkv = seconds(|| {
            let mut parts = [
                Part { linear: &l.q, out: &mut b.q },
                Part { linear: &l.k, out: &mut b.k },
                Part { linear: &l.v, out: &mut b.v },
            ];
            project(isa, path, &b.x, rows, &mut parts);
        });
        let o = seconds(|| project_add(isa, path, &b.x, rows, &l.o, &mut b.hidden));
        let gate_up = seconds(|| swiglu(isa, path, &b.x, rows, &l.gate, &l.up, &mut b.wide));
        let down = seconds(|| project_add(isa, path, &b.wide, rows, &l.down, &mut b.hidden));
        best = least(best, [qkv, o, gate_up, down, f64::INFINITY]);
    }
    if !b.logits.is_empty() {
        best[4] = seconds(|| project(isa, path, &b.x, rows, &mut [Part { linear: head, out: &mut b.logits }]));
    }
    best
}

fn rows_table(isa: Isa, weights: &Weights, threads: usize) {
    let before = bandwidth::read_gbps(threads).expect("bandwidth");
    let mut lines = vec![];
    for rows in [1, 2, 4, 8, 16] {
        let mut b = Buffers::new(rows, true);
        let one = |_| pass(isa, Path::Rows, rows, &weights.layers, &weights.head, &mut b);
        lines.push((rows, (0..6).map(one).fold([f64::INFINITY; 5], least)));
    }
    // The machine may be shared: the better of two measurements is the limit.
    let limit = before.max(bandwidth::read_gbps(threads).expect("bandwidth"));
    println!(
        "\nRows: GB/s of bf16 weights and share of the read bandwidth, {limit:.1} GB/s ({isa}, {threads} threads)"
    );
    print!("{:>6}", "rows");
    NAMES.iter().for_each(|name| print!("{name:>16}"));
    println!("{:>16}{:>10}", "all", "GFLOP/s");
    for (rows, seconds) in lines {
        print!("{rows:>6}");
        let share = |numbers: usize, s: f64| {
            let gbps = 2.0 * numbers as f64 / s / 1e9;
            print!("{gbps:>9.1} {:>4.0} %", 100.0 * gbps / limit);
        };
        sizes().iter().zip(seconds).for_each(|(&n, s)| share(n, s));
        let layers = |i: usize| if i < 4 { LAYERS } else { 1 };
        let all: usize = (0..5).map(|i| sizes()[i] * layers(i)).sum();
        let s: f64 = (0..5).map(|i| seconds[i] * layers(i) as f64).sum();
        share(all, s);
        println!("{:>10.0}", 2.0 * (all * rows) as f64 / s / 1e9);
    }
}

/// `out = x w^T` by the gemm crate with weights in f32.
#[allow(unsafe_code)]
fn direct(x: &[f32], w: &[f32], out: &mut [f32], rows: usize, n: usize, k: usize, threads: usize) {
    assert!(x.len() >= rows * k && w.len() >= n * k && out.len() >= rows * n, "direct: shapes");
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    let (x, w, out, ks, ns) = (x.as_ptr(), w.as_ptr(), out.as_mut_ptr(), k as isize, n as isize);
    // SAFETY: the sizes are asserted.
    unsafe {
        gemm::gemm(rows, n, k, out, 1, ns, false, x, 1, ks, w, ks, 1, 0.0, 1.0, false, false, false, parallelism);
    }
}

/// Seconds of the gemm crate for the operations of one layer.
fn direct_pass(rows: usize, w: &[f32], out: &mut [f32], b: &Buffers, threads: usize) -> [f64; 5] {
    let mut one = |x: &[f32], n, k| seconds(|| direct(x, w, out, rows, n, k, threads));
    let qkv = one(&b.x, HIDDEN, HIDDEN) + one(&b.x, KV, HIDDEN) + one(&b.x, KV, HIDDEN);
    let o = one(&b.x, HIDDEN, HIDDEN);
    let gate_up = one(&b.x, INTERMEDIATE, HIDDEN) + one(&b.x, INTERMEDIATE, HIDDEN);
    [qkv, o, gate_up, one(&b.wide, HIDDEN, INTERMEDIATE), f64::INFINITY]
}

fn panel_table(isa: Isa, weights: &Weights, threads: usize) {
    println!("\nPanel: GFLOP/s, the gemm crate's with f32 weights, share ({isa}, {threads} threads)");
    print!("{:>6}", "rows");
    NAMES[..4].iter().for_each(|name| print!("{name:>22}"));
    println!("{:>22}", "all");
    let w = vec![0.01f32; INTERMEDIATE * HIDDEN];
    for rows in [512, 128] {
        let mut b = Buffers::new(rows, false);
        let mut out = vec![0f32; rows * INTERMEDIATE];
        // In turns, so that a slow spell of the machine meets both.
        let (mut panel, mut limit) = ([f64::INFINITY; 5], [f64::INFINITY; 5]);
        for pair in weights.layers.chunks(2) {
            panel = least(panel, pass(isa, Path::Panel, rows, &pair[..1], &weights.head, &mut b));
            limit = least(limit, direct_pass(rows, &w, &mut out, &b, threads));
        }
        print!("{rows:>6}");
        let share = |numbers: usize, panel: f64, limit: f64| {
            let flop = 2.0 * (numbers * rows) as f64 / 1e9;
            print!("{:>8.0} {:>6.0} {:>4.0} %", flop / panel, flop / limit, 100.0 * limit / panel);
        };
        let sizes = sizes();
        (0..4).for_each(|i| share(sizes[i], panel[i], limit[i]));
        share(sizes[..4].iter().sum(), panel[..4].iter().sum(), limit[..4].iter().sum());
        println!();
    }
}

fn main() {
    // `cargo bench` passes `--bench`.
    let mut args = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = args.next().map_or(cores, |a| a.parse().expect("a number of threads"));
    let name = args.next();
    let isa = Isa::available().into_iter().rfind(|i| name.as_ref().is_none_or(|n| *n == i.to_string()));
    let isa = isa.expect("an instruction set of this machine");
    let weights = weights();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    pool.install(|| {
        rows_table(isa, &weights, threads);
        panel_table(isa, &weights, threads);
    });
}
