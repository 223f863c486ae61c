//! The engine on a GPU, as far as an emulated driver shows it, against the CPU device.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output as Finished};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::emulated::{HOST_GATHERS, emulate, folder, gpu, gpu_options, on_gpu, text};
use common::tiny::{Tiny, ids, with_nan};
use common::{Distance, device, fixture, kv};
use specache::device::buffer::Kind;
use specache::device::choice::gpus;
use specache::device::fault::{Fault, Faults};
use specache::device::{Device, DeviceOptions, GatherWay, Schedule};
use specache::engine::{GpuTarget, plan_on_gpu};
use specache::kv::cache::CacheBytes;
use specache::kv::{KvMode, KvOptions, KvShape};
use specache::model::{Dtype, Layer, Model, Rope, RopeScaling};
use specache::sampler::{Sampler, SamplingOptions, argmax};
use specache::session::{Buffers, Next, Prompt, Selections};
use specache::{Engine, Error, Result, Session};

/// Logits of a GPU and of the CPU device may differ, in numbers of about 3, by so much. As everywhere two f32 implementations
/// agree to 1e-5 until a K or V lies between two 16-bit numbers (tests/modes.rs). The GPU also rounds q and probabilities
/// to the cache's type for its tensor cores, 2^-9 (bf16) or 2^-12 (fp16) of each, which the CPU does not.
struct Bounds {
    max: f32,
    median: f32,
}

const BF16: Bounds = Bounds { max: 1e-1, median: 2e-2 };
const F16: Bounds = Bounds { max: 2e-2, median: 3e-3 };

/// Behind the first layer, K and V of the two devices differ by as much, and some of them lie so near to the border of two
/// low-bit codes that this decides which one they get. So the codes of a deeper model are not the same, all rows see
/// that, and its bound is a share of what the codes cost in the first place: of the KL divergence between `kivi` and `full`.
const SHARE_OF_CODES: f64 = 0.1;
const MAX_OF_CODES: f32 = 1.0;

/// Orders of execution to try: some, and more of them where there is time (`SPECACHE_TEST_SWEEP=1`).
fn seeds(few: &'static [&'static str], more: &'static [&'static str]) -> impl Iterator<Item = &'static str> {
    few.iter().chain(more.iter().filter(|_| sweeps())).copied()
}

fn sweeps() -> bool {
    std::env::var_os("SPECACHE_TEST_SWEEP").is_some()
}

/// What a sequence goes through: prompt lengths, each with the steps behind it.
type Script = [(usize, usize)];

/// One sequence of a batch.
#[derive(Clone, Copy, Debug)]
struct Member {
    kv: KvOptions,
    seed: u64,
    /// Tokens that its first prompt is longer than the script says.
    longer: usize,
}

impl Member {
    fn new(kv: KvOptions) -> Member {
        Member { kv, seed: 1, longer: 0 }
    }
}

/// What came out of it.
#[derive(Default, PartialEq, Debug)]
struct Output {
    /// Of each prompt and each step.
    logits: Vec<Vec<f32>>,
    selections: Vec<Selections>,
    /// Per layer.
    hits: Vec<(u64, u64)>,
    fetched: Vec<(u64, u64)>,
    bytes: (u64, u64, u64),
}

/// Tokens of a member's life.
fn tokens(member: &Member, script: &Script) -> Vec<u32> {
    ids(member.seed, member.longer + script.iter().map(|(prompt, steps)| prompt + steps).sum::<usize>() + 1)
}

fn begin(engine: &Engine, member: &Member, script: &Script) -> Session {
    let n = tokens(member, script).len();
    let mut session = engine.session(member.kv, n).unwrap();
    session.keep_trace();
    // Guesses that both devices share: near-ties of logits are not what is compared.
    session.force_speculative(ids(member.seed + 1000, 2 * n));
    session
}

/// A batch through a script: all prompts of a round in one call, all steps together.
fn live(engine: &Engine, members: &[Member], script: &Script, buffers: &mut Buffers) -> Vec<Output> {
    let mut sessions: Vec<Session> = members.iter().map(|member| begin(engine, member, script)).collect();
    let texts: Vec<Vec<u32>> = members.iter().map(|member| tokens(member, script)).collect();
    let mut outputs: Vec<Output> = members.iter().map(|_| Output::default()).collect();
    for (round, &(prompt, steps)) in script.iter().enumerate() {
        let mut prompts = vec![];
        for ((session, text), member) in sessions.iter_mut().zip(&texts).zip(members) {
            let from = session.n_tokens();
            let n = prompt + if round == 0 { member.longer } else { 0 };
            prompts.push(Prompt { session, tokens: &text[from..from + n] });
        }
        let rows = engine.prefill(&mut prompts, buffers).unwrap();
        outputs.iter_mut().zip(rows).for_each(|(output, row)| output.logits.push(row.unwrap()));
        for step in 0..steps {
            let mut batch = vec![];
            for (session, text) in sessions.iter_mut().zip(&texts) {
                let token = text[session.n_tokens()];
                batch.push(Next { session, token });
            }
            engine.decode(&mut batch, buffers).unwrap();
            for (i, (output, session)) in outputs.iter_mut().zip(&sessions).enumerate() {
                output.logits.push(buffers.logits(i).unwrap().to_vec());
                let trace = session.trace().unwrap();
                if step == 0 && session.kv().mode == KvMode::SpeCache {
                    output.selections.push(trace.pre_decode.clone());
                }
                output.selections.extend(trace.steps.last().cloned().filter(|_| session.kv().mode.fetches()));
            }
        }
    }
    for (output, session) in outputs.iter_mut().zip(&sessions) {
        let stats = session.stats();
        (output.hits, output.fetched) = (stats.hits.clone(), stats.fetched.clone());
        output.bytes = (stats.fetched_bytes, stats.pre_decode_bytes, stats.offloaded_bytes);
    }
    outputs
}

/// Lives on both devices are the same: logits within bounds, selections but for near-ties, and, where those are equal too,
/// every figure. `codes`: what the low-bit codes cost in logits, where both devices may have other ones.
fn compare(what: &str, member: &Member, ours: &Output, theirs: &Output, windowed: bool, codes: Option<f64>) {
    let distance = Distance::between(&ours.logits, &theirs.logits);
    let bounds = if member.kv.dtype == Some(Dtype::F16) { F16 } else { BF16 };
    match codes {
        Some(cost) => {
            let share = distance.mean_kld / cost.max(1e-9);
            assert!(
                share < SHARE_OF_CODES || distance.median < bounds.median,
                "{what}: {distance:?}, {share:.3} of codes"
            );
            assert!(distance.max < MAX_OF_CODES, "{what}: {distance:?}");
        }
        None => assert!(distance.max < bounds.max && distance.median < bounds.median, "{what}: {distance:?}"),
    }
    assert_eq!(ours.selections.len(), theirs.selections.len(), "{what}: selections");
    let (mut sets, mut differ) = (0, 0);
    for (a, b) in ours.selections.iter().flatten().flatten().zip(theirs.selections.iter().flatten().flatten()) {
        assert_eq!(a.len(), b.len(), "{what}: {a:?} {b:?}");
        assert!(a.is_sorted_by(|x, y| x < y), "{what}: {a:?}");
        let missing = b.iter().filter(|p| a.binary_search(p).is_err()).count();
        sets += 1;
        differ += usize::from(missing > 0);
        assert!(missing <= 3.max(b.len() / 8), "{what}: {a:?} {b:?}");
    }
    if differ == 0 {
        // The CPU device keeps a selection in the first slots: one that shrinks, behind a window, may move pairs.
        let as_few = |(a, b): (&(u64, u64), &(u64, u64))| a.1 == b.1 && a.0 <= b.0 && (windowed || a.0 == b.0);
        assert!(
            ours.fetched.iter().zip(&theirs.fetched).all(as_few),
            "{what}: {:?} {:?}",
            ours.fetched,
            theirs.fetched
        );
        assert!(windowed || ours.bytes == theirs.bytes, "{what}: {:?} {:?}", ours.bytes, theirs.bytes);
        let near = |(a, b): (&(u64, u64), &(u64, u64))| a.1 == b.1 && a.0.abs_diff(b.0) * 50 <= b.1;
        assert!(ours.hits.iter().zip(&theirs.hits).all(near), "{what}: {:?} {:?}", ours.hits, theirs.hits);
    }
    let Distance { max, median, mean_kld, .. } = distance;
    println!(
        "{what}: max {max:.1e} median {median:.1e} kld {mean_kld:.1e} of {codes:?}, {differ} of {sets} selections"
    );
    // Near-ties: a few of the smallest among them.
    assert!(differ * 5 <= sets.max(10), "{what}: {differ} of {sets} selections");
}

const fn model(head_dim: usize, n_kv_heads: usize, group_heads: usize, window: Option<usize>) -> Tiny {
    Tiny { head_dim, n_kv_heads, group_heads, n_layers: 2, window }
}

const SMALL: Tiny = model(64, 2, 3, None);
/// All low-bit codes are those of the CPU device.
const ONE_LAYER: Tiny = Tiny { n_layers: 1, ..SMALL };

/// A batch of these members, on both devices.
fn check(what: &str, model: impl Fn() -> Model, options: DeviceOptions, members: &[Member], script: &Script) {
    let cpu = Engine::new(model(), device(1)).unwrap();
    let gpu = gpu(options);
    let engine = Engine::new(model(), gpu.device.clone()).unwrap();
    let mut buffers = Buffers::default();
    let theirs = live(&cpu, members, script, &mut Buffers::default());
    let ours = live(&engine, members, script, &mut buffers);
    for ((member, ours), theirs) in members.iter().zip(&ours).zip(&theirs) {
        let of = |mode| Member { kv: KvOptions { mode, ..member.kv }, ..*member };
        let row = |mode| live(&cpu, &[of(mode)], script, &mut Buffers::default()).remove(0).logits;
        let exact = cpu.model().config.n_layers == 1 || !member.kv.mode.low_bit();
        let codes = (!exact).then(|| Distance::between(&row(KvMode::Kivi), &row(KvMode::Full)).mean_kld);
        let windowed = cpu.model().config.sliding_window.is_some();
        compare(&format!("{what}, {member:?}"), member, ours, theirs, windowed, codes);
    }
}

fn every_mode(bits: usize, group_size: usize, residual_len: usize, top_k: usize, dtype: Dtype) -> Vec<Member> {
    let options = |mode| KvOptions { dtype: Some(dtype), ..kv(mode, bits, group_size, residual_len, top_k) };
    KvMode::ALL.map(|mode| Member::new(options(mode))).to_vec()
}

/// Every width of codes with every group size and both number types, in one batch of all modes.
#[test]
fn every_code() {
    for seed in seeds(&["1"], &["0", "2", "3", "4"]) {
        on_gpu("every_code", &[("SPECACHE_EMU_SEED", seed)], || {
            let codes = [(1, 64), (1, 32), (2, 32), (2, 64), (4, 64), (4, 32)];
            for ((bits, group_size), dtype) in codes.into_iter().zip([Dtype::Bf16, Dtype::F16].into_iter().cycle()) {
                let members = every_mode(bits, group_size, 33, 7, dtype);
                check(
                    &format!("{bits} bits, g {group_size}"),
                    || ONE_LAYER.model(),
                    gpu_options(),
                    &members,
                    &[(150, 6)],
                );
            }
        });
    }
}

/// Prompts around every border of pages and residuals, eight of one mode in a batch.
#[test]
fn prompts_around_borders() {
    on_gpu("prompts_around_borders", &[], || {
        for (residual_len, mode) in [
            (32, KvMode::SpeCache),
            (33, KvMode::Fetch),
            (64, KvMode::SpeCache),
            (64, KvMode::Kivi),
            (128, KvMode::Offload),
            (100, KvMode::SpeCache),
        ] {
            let lengths = [1, 63, 64, 65, 127, 128, 129, 193];
            let options = KvOptions { dtype: Some(Dtype::F16), ..kv(mode, 2, 32, residual_len, 7) };
            let members = lengths.map(|n| Member { longer: n - 1, ..Member::new(options) });
            check(&format!("R {residual_len}"), || SMALL.model(), gpu_options(), &members, &[(1, 4)]);
        }
    });
}

/// Long enough for two pages of each sequence to leave while it decodes.
#[test]
fn pages_leave_in_decode() {
    on_gpu("pages_leave_in_decode", &[("SPECACHE_EMU_SEED", "3")], || {
        let members = every_mode(2, 64, 32, 16, Dtype::F16);
        check("long", || SMALL.model(), gpu_options(), &members, &[(90, 140)]);
    });
}

/// Prompts behind decoded tokens, in sessions that were made for all of it.
const TALK: &Script = &[(35, 3), (1, 60), (2, 5), (200, 20), (1, 0), (64, 3)];

#[test]
fn continued_prefill() {
    on_gpu("continued_prefill", &[("SPECACHE_EMU_SEED", "1")], || {
        check("a talk", || SMALL.model(), gpu_options(), &every_mode(2, 64, 33, 7, Dtype::F16), TALK);
        let window = || model(64, 1, 4, Some(90)).model();
        check("a talk behind a window", window, gpu_options(), &every_mode(4, 32, 64, 7, Dtype::F16), TALK);
    });
}

/// Rows that are computed together have no say in each other's bits, so it does not matter where prompts are cut.
#[test]
fn prompts_in_chunks() {
    on_gpu("prompts_in_chunks", &[("SPECACHE_EMU_SEED", "2")], || {
        let members = every_mode(2, 64, 33, 7, Dtype::F16);
        let lives = [None, Some(48), Some(17), Some(65)].map(|prefill_rows| {
            let device = gpu(DeviceOptions { prefill_rows, ..gpu_options() });
            let engine = Engine::new(SMALL.model(), device.device.clone()).unwrap();
            live(&engine, &members, &[(70, 2), (65, 2)], &mut Buffers::default())
        });
        for (cut, of) in lives[1..].iter().zip([48, 17, 65]) {
            for ((cut, whole), member) in cut.iter().zip(&lives[0]).zip(&members) {
                assert!(cut == whole, "{member:?} in chunks of {of} rows");
            }
        }
        // What another number of rows does to cuBLASLt's products is its own affair, and within bounds.
        let options = DeviceOptions { prefill_rows: Some(48), ..gpu_options() };
        check("chunks of 48 rows", || ONE_LAYER.model(), options, &members, &[(150, 3)]);
    });
}

/// Every shape that kernels are made for: both head sizes, groups up to 16 heads, windows on either side of the residual.
#[test]
fn shapes() {
    on_gpu("shapes", &[], || {
        for shape in
            [model(128, 1, 8, None), model(128, 2, 1, Some(100)), model(64, 1, 16, Some(40)), model(64, 3, 1, None)]
        {
            let shape = Tiny { n_layers: 1, ..shape };
            check(
                &format!("{shape:?}"),
                || shape.model(),
                gpu_options(),
                &every_mode(2, 64, 33, 64, Dtype::F16),
                &[(170, 5)],
            );
        }
    });
}

/// What models have beside the plain Llama: norms of heads, biases, tied heads, stretched RoPE.
#[test]
fn model_features() {
    on_gpu("model_features", &[], || {
        let members = every_mode(4, 64, 33, 7, Dtype::F16);
        type Change = fn(&mut Model);
        let features: [(&str, Change); 4] = [
            ("norms of heads", |model| {
                model.config.qk_norm = true;
                let norm = |d: usize| Some((0..d).map(|i| 0.5 + i as f32 / d as f32).collect());
                let d = model.config.head_dim;
                model.weights.layers.iter_mut().for_each(|layer| (layer.q_norm, layer.k_norm) = (norm(d), norm(d)));
            }),
            ("biases", |model| {
                (model.config.qkv_bias, model.config.o_bias, model.config.mlp_bias) = (true, true, true);
                for layer in &mut model.weights.layers {
                    let Layer { q, k, v, o, gate, up, down, .. } = layer;
                    for linear in [q, k, v, o, gate, up, down] {
                        let n = linear.weight.rows();
                        linear.bias = Some((0..n).map(|i| (i as f32 * 0.7).sin() / 4.0).collect());
                    }
                }
            }),
            ("a tied head", |model| {
                model.config.tie_word_embeddings = true;
                model.weights.lm_head.weight = model.weights.embed.clone();
            }),
            ("YaRN", |model| {
                let scaling = RopeScaling::Yarn {
                    factor: 4.0,
                    original_max_positions: 2048,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    attention_factor: 1.14,
                    truncate: true,
                };
                model.config.rope = Rope { theta: 10_000.0, scaling };
            }),
        ];
        let plain =
            live(&Engine::new(SMALL.model(), device(1)).unwrap(), &members[..1], &[(100, 3)], &mut Buffers::default());
        for (what, change) in features {
            let model = || {
                let mut model = SMALL.model();
                change(&mut model);
                model
            };
            check(what, model, gpu_options(), &members, &[(100, 3)]);
            let other =
                live(&Engine::new(model(), device(1)).unwrap(), &members[..1], &[(100, 3)], &mut Buffers::default());
            assert!(Distance::between(&plain[0].logits, &other[0].logits).max > 0.1, "{what} changes nothing");
        }
    });
}

/// Twenty sequences of all modes and lengths, of one mode more than share a launch: each has the bits that it has alone.
#[test]
fn batches() {
    on_gpu("batches", &[("SPECACHE_EMU_SEED", "1")], || {
        let gpu = gpu(gpu_options());
        let engine = Engine::new(SMALL.model(), gpu.device.clone()).unwrap();
        let options = |mode, top_k| KvOptions { dtype: Some(Dtype::F16), ..kv(mode, 1, 32, 33, top_k) };
        let mut members: Vec<Member> = (0..11)
            .map(|i| Member { seed: i, longer: 23 * i as usize % 130, ..Member::new(options(KvMode::SpeCache, 7)) })
            .collect();
        for (i, mode) in
            KvMode::ALL.into_iter().chain([KvMode::Full, KvMode::Fetch, KvMode::Fetch, KvMode::Kivi]).enumerate()
        {
            members.push(Member { seed: 50 + i as u64, longer: 31 * i % 100, ..Member::new(options(mode, 7 + i % 2)) });
        }
        let script = &[(40, 4), (3, 3)];
        let mut buffers = Buffers::default();
        for n in [members.len(), 3] {
            let together = live(&engine, &members[members.len() - n..], script, &mut buffers);
            for (member, together) in members[members.len() - n..].iter().zip(&together) {
                let alone = live(&engine, std::slice::from_ref(member), script, &mut Buffers::default());
                assert!(alone[0] == *together, "{n} sequences, {member:?}");
            }
        }
    });
}

/// Who gathers makes no difference to any bit: eleven sequences of one mode and others, a talk, every schedule; and while
/// `auto` tries both ways.
#[test]
fn who_gathers_makes_no_difference() {
    for seed in seeds(&["0"], &["1", "2", "3"]) {
        on_gpu("who_gathers_makes_no_difference", &[("SPECACHE_EMU_SEED", seed)], gathered_either_way);
    }
}

fn gathered_either_way() {
    let options = |mode, top_k| KvOptions { dtype: Some(Dtype::F16), ..kv(mode, 1, 32, 33, top_k) };
    let many: Vec<Member> = (0..11)
        .map(|i| Member { seed: i, longer: 41 * i as usize % 150, ..Member::new(options(KvMode::SpeCache, 7)) })
        .chain([KvMode::Fetch, KvMode::Kivi, KvMode::Fetch].map(|mode| Member::new(options(mode, 8))))
        .collect();
    let fetching = [KvMode::Fetch, KvMode::SpeCache].map(|mode| Member::new(options(mode, 64)));
    let lives = |gather, pipeline, members: &[Member], script: &Script| {
        let gpu = gpu(DeviceOptions { gather: Some(gather), pipeline, ..gpu_options() });
        live(&Engine::new(SMALL.model(), gpu.device.clone()).unwrap(), members, script, &mut Buffers::default())
    };
    let check = |members: &[Member], script: &Script, ways: &[(GatherWay, Schedule)]| {
        let expected = lives(GatherWay::Gpu, Schedule::Event, members, script);
        for &(gather, pipeline) in ways {
            assert!(expected == lives(gather, pipeline, members, script), "{gather:?}, {pipeline:?}, {script:?}");
        }
    };
    // Selections of two modes run in two queues: letters ring in another order than that in which they are taken.
    let mixed = [(KvMode::SpeCache, 7), (KvMode::SpeCache, 8), (KvMode::Fetch, 7)];
    let mixed = mixed.map(|(mode, top_k)| Member::new(options(mode, top_k)));
    check(&mixed, &[(130, 3)], &[(GatherWay::Cpu, Schedule::Event)]);
    check(&many, &[(40, 3), (3, 1)], &[(GatherWay::Cpu, Schedule::Event)]);
    let all = Schedule::ALL.map(|schedule| (GatherWay::Cpu, schedule));
    check(&fetching, &[(90, 3)], &all);
    check(&fetching, TALK, &[(GatherWay::Auto, Schedule::Event)]);
}

/// Several threads share an engine: each has the bits that it has alone.
#[test]
fn threads() {
    let ways = [None, Some(HOST_GATHERS)];
    for (seed, way) in seeds(&["1"], &["0", "2", "5"]).flat_map(|seed| ways.map(|way| (seed, way))) {
        let environment: Vec<_> = way.into_iter().chain([("SPECACHE_EMU_SEED", seed)]).collect();
        on_gpu("threads", &environment, || {
            let device = Device::open(&DeviceOptions { threads: Some(3), ..gpu_options() }).unwrap();
            let engine = Engine::new(SMALL.model(), device).unwrap();
            let members = every_mode(2, 64, 33, 7, Dtype::F16);
            let script = &[(100, 4), (30, 2)];
            let run =
                |i: usize| live(&engine, &[members[4 - i % 5], members[(i + 2) % 5]], script, &mut Buffers::default());
            let alone: Vec<_> = (0..3).map(run).collect();
            let together: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..3).map(|i| scope.spawn(move || run(i))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(alone == together);
        });
    }
}

/// The same bits, whatever waits for what. Without delta prefetch every pair is fetched, into other slots than with it: the
/// same pairs, but the sums follow the slots.
#[test]
fn schedules_and_delta() {
    on_gpu("schedules_and_delta", &[("SPECACHE_EMU_SEED", "4")], || {
        let members = every_mode(2, 64, 32, 16, Dtype::F16);
        let script = &[(130, 8)];
        let runs = [true, false].map(|delta| {
            let lives = Schedule::ALL.map(|pipeline| {
                let gpu = gpu(DeviceOptions { pipeline, delta, ..gpu_options() });
                let engine = Engine::new(ONE_LAYER.model(), gpu.device.clone()).unwrap();
                live(&engine, &members, script, &mut Buffers::default())
            });
            assert!(lives[0] == lives[1] && lives[0] == lives[2], "delta {delta}");
            // Without `offload` passes become graphs, in which the host may wait for nothing.
            let graphs: Vec<Member> = members.iter().filter(|m| m.kv.mode != KvMode::Offload).copied().collect();
            let lives_of_graphs = Schedule::ALL.map(|pipeline| {
                let gpu = gpu(DeviceOptions { pipeline, delta, ..gpu_options() });
                let engine = Engine::new(ONE_LAYER.model(), gpu.device.clone()).unwrap();
                live(&engine, &graphs, script, &mut Buffers::default())
            });
            assert!(
                lives_of_graphs[0] == lives_of_graphs[1] && lives_of_graphs[0] == lives_of_graphs[2],
                "delta {delta}"
            );
            lives.into_iter().next().unwrap()
        });
        for ((with, without), member) in runs[0].iter().zip(&runs[1]).zip(&members) {
            let what = format!("{member:?}");
            let distance = Distance::between(&with.logits, &without.logits);
            assert!(distance.max < F16.max && distance.median < F16.median, "{what}: {distance:?}");
            assert!(with.selections == without.selections && with.hits == without.hits, "{what}");
            assert!(
                without.fetched.iter().all(|(fetched, selected)| fetched == selected),
                "{what}: {:?}",
                without.fetched
            );
            let saves = with.fetched.iter().all(|(fetched, selected)| fetched < selected);
            assert!(saves || !member.kv.mode.fetches(), "{what}: {:?}", with.fetched);
        }
    });
}

fn prefill(engine: &Engine, session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    engine.prefill(&mut [Prompt { session, tokens }], &mut Buffers::default()).unwrap().remove(0).unwrap()
}

fn decode(engine: &Engine, session: &mut Session, tokens: &[u32], buffers: &mut Buffers) -> Vec<Vec<f32>> {
    let mut row = |&token: &u32| {
        engine.decode(&mut [Next { session: &mut *session, token }], buffers).unwrap();
        buffers.logits(0).unwrap().to_vec()
    };
    tokens.iter().map(&mut row).collect()
}

/// Tokens are chosen where the logits are, and are those that the host would choose from the same logits, whoever asks first and
/// however often.
#[test]
fn tokens_are_chosen_on_the_gpu() {
    on_gpu("tokens_are_chosen_on_the_gpu", &[("SPECACHE_EMU_SEED", "1")], || {
        let gpu = gpu(gpu_options());
        let engine = Engine::new(SMALL.model(), gpu.device.clone()).unwrap();
        let kv = KvOptions { dtype: Some(Dtype::F16), ..kv(KvMode::SpeCache, 2, 32, 33, 7) };
        let lengths = [70, 5, 131];
        let mut sessions: Vec<Session> = lengths.iter().map(|n| engine.session(kv, n + 20).unwrap()).collect();
        let texts: Vec<Vec<u32>> = lengths.iter().map(|&n| ids(n as u64, n + 20)).collect();
        let mut buffers = Buffers::default();
        for ((session, text), &n) in sessions.iter_mut().zip(&texts).zip(&lengths) {
            prefill(&engine, session, &text[..n]);
        }
        let greedy = SamplingOptions::default();
        let all = SamplingOptions { temperature: 1.0, ..greedy };
        let cases = [
            greedy,
            all,
            SamplingOptions { temperature: 0.7, top_k: 12, ..greedy },
            SamplingOptions { temperature: 1.3, top_p: 0.8, min_p: 0.01, ..greedy },
            SamplingOptions { repeat_penalty: 1.4, ..greedy },
            SamplingOptions { temperature: 0.9, top_k: 30, top_p: 0.95, repeat_penalty: 1.2, ..greedy },
        ];
        let mut chosen = Vec::new();
        for (step, options) in cases.into_iter().enumerate() {
            let mut batch: Vec<Next> = sessions
                .iter_mut()
                .zip(&texts)
                .map(|(session, text)| {
                    let token = text[session.n_tokens()];
                    Next { session, token }
                })
                .collect();
            engine.decode(&mut batch, &mut buffers).unwrap();
            for (i, text) in texts.iter().enumerate() {
                let options = SamplingOptions { seed: (step * 10 + i) as u64, ..options };
                let (mut there, mut here) = (Sampler::new(options).unwrap(), Sampler::new(options).unwrap());
                // Twice: the second token of a seed is another draw from the same row.
                let ours: Vec<u32> = (0..2).map(|_| buffers.sample(i, &mut there, text).unwrap()).collect();
                let best = buffers.argmax(i).unwrap();
                let logits = buffers.logits(i).unwrap().to_vec();
                let theirs: Vec<u32> = (0..2).map(|_| here.sample(&logits, text).unwrap()).collect();
                assert_eq!((&ours, best), (&theirs, argmax(&logits)), "{options:?}, sequence {i}");
                assert_eq!(buffers.argmax(i).unwrap(), best, "a drawn token is not the best one's");
                chosen.push((ours, best));
            }
        }
        assert!(chosen.iter().any(|(tokens, best)| tokens[0] != *best), "nothing was left to chance");
        assert!(chosen.iter().any(|(tokens, _)| tokens[0] != tokens[1]), "every draw is the same");
    });
}

/// Forks, truncations and more room leave the bits of sequences that came another way.
#[test]
fn forks_truncations_and_growth() {
    for environment in [[("SPECACHE_EMU_SEED", "1")], [HOST_GATHERS]] {
        on_gpu("forks_truncations_and_growth", &environment, || {
            let gpu = gpu(gpu_options());
            let engine = Engine::new(SMALL.model(), gpu.device.clone()).unwrap();
            let (tokens, mut buffers) = (ids(2, 300), Buffers::default());
            for mode in
                KvMode::ALL.into_iter().filter(|mode| gpu_options().gather.is_none() || *mode == KvMode::SpeCache)
            {
                let kv = KvOptions { dtype: Some(Dtype::F16), ..kv(mode, 2, 32, 33, 7) };
                let fed = |n: usize, room: usize, buffers: &mut Buffers| {
                    let mut session = engine.session(kv, room).unwrap();
                    prefill(&engine, &mut session, &tokens[..20]);
                    decode(&engine, &mut session, &tokens[20..n], buffers);
                    session
                };
                let mut long = fed(100, 160, &mut buffers);
                let mut small = fed(40, 40, &mut buffers);
                small.reserve(160).unwrap();
                decode(&engine, &mut small, &tokens[40..100], &mut buffers);
                let mut fork = long.fork().unwrap();
                let rows = [&mut long, &mut small, &mut fork]
                    .map(|session| decode(&engine, session, &tokens[100..104], &mut buffers));
                assert!(rows[0] == rows[1], "{mode:?}: grown");
                assert!(rows[0] == rows[2], "{mode:?}: forked");
                drop(small);
                if mode == KvMode::Kivi {
                    continue; // cannot go back
                }
                for n in [98, 64, 21] {
                    let mut fork = long.fork().unwrap();
                    long.truncate(n).unwrap();
                    fork.truncate(n).unwrap();
                    let mut short = fed(n, 160, &mut buffers);
                    short.truncate(n).unwrap();
                    let rows = [&mut fork, &mut short]
                        .map(|session| decode(&engine, session, &tokens[200..203], &mut buffers));
                    assert!(rows[0] == rows[1], "{mode:?}, {n} tokens");
                    let rows = [&mut fork, &mut short].map(|session| prefill(&engine, session, &tokens[100..140]));
                    assert!(rows[0] == rows[1], "{mode:?}, {n} tokens, a second prompt");
                }
            }
        });
    }
}

/// Whoever goes first: sessions, buffers and the engine, on this thread or another, while gathers are under way.
#[test]
fn ends_in_any_order() {
    for environment in [vec![("SPECACHE_EMU_SEED", "0")], vec![("SPECACHE_EMU_SEED", "3")], vec![HOST_GATHERS]] {
        on_gpu("ends_in_any_order", &environment, || {
            for order in (0..6).filter(|order| gpu_options().gather.is_none() || order % 2 == 0) {
                let gpu = gpu(gpu_options());
                let engine = Engine::new(SMALL.model(), gpu.device.clone()).unwrap();
                let mut buffers = Buffers::default();
                let mut sessions: Vec<Session> =
                    KvMode::ALL.into_iter().map(|mode| engine.session(kv(mode, 2, 64, 32, 16), 300).unwrap()).collect();
                let tokens = ids(4, 200);
                let mut prompts: Vec<Prompt> =
                    sessions.iter_mut().map(|session| Prompt { session, tokens: &tokens[..127] }).collect();
                engine.prefill(&mut prompts, &mut buffers).unwrap();
                for &token in &tokens[127..130] {
                    let mut batch: Vec<Next> = sessions.iter_mut().map(|session| Next { session, token }).collect();
                    engine.decode(&mut batch, &mut buffers).unwrap();
                }
                match order {
                    0 => drop((buffers, sessions, engine)),
                    1 => drop((sessions, buffers, engine)),
                    2 => drop((engine, sessions, buffers)),
                    3 => drop((engine, buffers, sessions)),
                    4 => std::thread::spawn(|| drop((buffers, sessions, engine))).join().unwrap(),
                    _ => std::thread::spawn(|| drop((engine, sessions, buffers))).join().unwrap(),
                }
            }
        });
    }
}

/// Buffers know whose they are: two models on one GPU, and the CPU device, by turns.
#[test]
fn buffers_of_several_engines() {
    on_gpu("buffers_of_several_engines", &[], || {
        let gpu = [gpu(gpu_options()), self::gpu(gpu_options())];
        let models = [SMALL, model(128, 1, 2, None), Tiny { n_layers: 3, ..SMALL }];
        let mut engines: Vec<Engine> =
            models.iter().map(|model| Engine::new(model.model(), gpu[0].device.clone()).unwrap()).collect();
        engines.push(Engine::new(SMALL.model(), gpu[1].device.clone()).unwrap());
        engines.push(Engine::new(SMALL.model(), device(1)).unwrap());
        let members = every_mode(2, 64, 33, 7, Dtype::F16);
        let mut shared = Buffers::default();
        for engine in &engines {
            let together = live(engine, &members, &[(100, 2)], &mut shared);
            assert!(together == live(engine, &members, &[(100, 2)], &mut Buffers::default()));
        }
    });
}

/// A call again until it is not interrupted.
fn persist<T>(engine: &Engine, mut call: impl FnMut() -> Result<T>) -> Result<T> {
    loop {
        match call() {
            Err(Error::Interrupted) => engine.interrupt_flag().store(false, Ordering::Relaxed),
            other => return other,
        }
    }
}

/// Interrupted wherever a GPU looks, and called again: the same bits.
#[test]
fn interruptions_leave_the_bits() {
    on_gpu("interruptions_leave_the_bits", &[("SPECACHE_EMU_SEED", "1")], || {
        let life = |engine: &Engine| {
            let (mut rows, mut buffers, tokens) = (vec![], Buffers::default(), ids(9, 900));
            let mut sessions =
                [KvMode::Offload, KvMode::SpeCache].map(|mode| engine.session(kv(mode, 2, 64, 33, 7), 800).unwrap());
            let mut n = 0;
            for (prompt, steps) in [(520, 2), (60, 2)] {
                let first = persist(engine, || {
                    let mut prompts: Vec<Prompt> =
                        sessions.iter_mut().map(|session| Prompt { session, tokens: &tokens[n..n + prompt] }).collect();
                    engine.prefill(&mut prompts, &mut buffers)
                });
                rows.extend(first.unwrap().into_iter().map(Result::unwrap));
                n += prompt;
                for _ in 0..steps {
                    let step = persist(engine, || {
                        let mut batch: Vec<Next> =
                            sessions.iter_mut().map(|session| Next { session, token: tokens[n] }).collect();
                        engine.decode(&mut batch, &mut buffers)
                    });
                    step.unwrap();
                    rows.extend((0..sessions.len()).map(|i| buffers.logits(i).unwrap().to_vec()));
                    n += 1;
                }
            }
            rows
        };
        let sound = gpu(gpu_options());
        let expected = life(&Engine::new(SMALL.model(), sound.device.clone()).unwrap());
        // A chunk of 2 prompts in 2 layers, a pre-decode, 2 steps; and the same again.
        for index in [0, 1, 4, 5, 6, 8, 11, 13, 14] {
            let faults = Arc::new(Faults::at(Fault::Interrupt, index));
            let gpu = gpu(DeviceOptions { faults: Some(faults.clone()), ..gpu_options() });
            let rows = life(&Engine::new(SMALL.model(), gpu.device.clone()).unwrap());
            assert!(rows == expected, "interruption {index}");
            assert_eq!(faults.has_struck(), index < 14, "interruption {index}");
        }
    });
}

/// A token whose embedding is NaN fails its own sequence, in a prompt and in a step.
#[test]
fn nan_fails_its_own_sequence() {
    on_gpu("nan_fails_its_own_sequence", &[], || {
        let gpu = gpu(gpu_options());
        let mut model = SMALL.model();
        model.weights.embed = with_nan(&model.weights.embed, 7, 3);
        let engine = Engine::new(model, gpu.device.clone()).unwrap();
        let sound: Vec<u32> = ids(3, 200).into_iter().filter(|&token| token != 7).take(120).collect();
        let mut bad = sound.clone();
        bad[50] = 7;
        let mut buffers = Buffers::default();
        let mut sessions = KvMode::ALL.map(|mode| engine.session(kv(mode, 2, 64, 33, 7), 200).unwrap());
        sessions.iter_mut().for_each(|session| session.force_speculative([5; 20]));
        let mut unlucky = engine.session(kv(KvMode::SpeCache, 2, 64, 33, 7), 200).unwrap();
        let mut prompts: Vec<Prompt> = sessions.iter_mut().map(|session| Prompt { session, tokens: &sound }).collect();
        prompts.insert(2, Prompt { session: &mut unlucky, tokens: &bad });
        let results = engine.prefill(&mut prompts, &mut buffers).unwrap();
        for (i, result) in results.iter().enumerate() {
            match result {
                Ok(row) => assert!(i != 2 && row.iter().all(|x| x.is_finite())),
                Err(why) => assert!(i == 2 && why.exit_code() == 1 && why.to_string().contains("embedding"), "{why}"),
            }
        }
        for step in 0..2 {
            let unlucky = if step == 0 { 5 } else { 3 };
            let mut batch: Vec<Next> = sessions
                .iter_mut()
                .enumerate()
                .map(|(i, session)| Next { session, token: if step == 1 && i == unlucky { 7 } else { 4 } })
                .collect();
            engine.decode(&mut batch, &mut buffers).unwrap();
            for i in 0..KvMode::ALL.len() {
                match buffers.logits(i) {
                    Ok(row) => assert!(i != unlucky && row.iter().all(|x| x.is_finite()), "{i}"),
                    Err(why) => assert!(i == unlucky && why.exit_code() == 1, "{why}"),
                }
            }
        }
        // Its guess is NaN's too: the real row is none the wiser.
        sessions[4].force_speculative([7, 7, 7]);
        for token in [4, 5, 6] {
            engine.decode(&mut [Next { session: &mut sessions[4], token }], &mut buffers).unwrap();
            assert!(buffers.logits(0).unwrap().iter().all(|x| x.is_finite()));
        }
    });
}

/// What does not fit is refused with its bytes, by the budget or by the GPU itself, and the engine goes on.
#[test]
fn out_of_memory() {
    on_gpu("out_of_memory", &[], || {
        let refused = |budget| {
            let device = Device::open(&DeviceOptions { device_budget: Some(budget), ..gpu_options() }).unwrap();
            Engine::new(SMALL.model(), device).err().unwrap()
        };
        let text = refused(10_000).to_string();
        assert!(text.contains("out of device memory: a copy of the weights needs "), "{text}");
        assert!(text.contains("10000 bytes are available; raise --vram-budget"), "{text}");
        let device = Device::open(&DeviceOptions { device_budget: Some(8 << 20), ..gpu_options() }).unwrap();
        refuses_and_goes_on(&Engine::new(SMALL.model(), device).unwrap());
    });
}

/// The budget that follows from a GPU's memory, and a GPU whose memory others have.
#[test]
fn out_of_memory_of_the_gpu() {
    on_gpu("out_of_memory_of_the_gpu", &[("SPECACHE_EMU_VRAM", "8000000")], || {
        let device = Device::open(&gpu_options()).unwrap();
        refuses_and_goes_on(&Engine::new(SMALL.model(), device).unwrap());
        // Two devices with a budget of their own each: together they have more than there is.
        let devices = [(); 2].map(|()| Device::open(&gpu_options()).unwrap());
        let engines = devices.map(|device| Engine::new(SMALL.model(), device).unwrap());
        let full = |engine: &Engine| {
            let mut held = vec![];
            loop {
                match engine.session(kv(KvMode::Full, 2, 64, 33, 7), 1000) {
                    Ok(session) => held.push(session),
                    Err(why) => return (held, why),
                }
            }
        };
        let (held, _) = full(&engines[0]);
        let why = full(&engines[1]).1;
        assert!(why.exit_code() == 4 && why.to_string().contains("out of device memory"), "{why}");
        drop(held);
        refuses_and_goes_on(&engines[1]);
    });
}

/// What `plan` says of a GPU: caches with their lists, and what decode steps work in; without cuBLASLt, which has no products
/// of fp32 weights, and with it.
#[test]
fn plans_are_what_decoding_takes() {
    on_gpu("plans_are_what_decoding_takes", &[], || {
        let open = || Device::open(&gpu_options()).unwrap();
        let all = KvMode::ALL.into_iter().flat_map(|mode| [(mode, 1), (mode, 3)]);
        takes_what_is_planned(&Engine::new(SMALL.model(), open()).unwrap(), 4, all);
        let some = [(KvMode::Full, 5), (KvMode::SpeCache, 1), (KvMode::SpeCache, 5)];
        takes_what_is_planned(&Engine::new(Model::load("synthetic:tiny").unwrap(), open()).unwrap(), 2, some);
        let by_host = Device::open(&DeviceOptions { gather: Some(GatherWay::Auto), ..gpu_options() }).unwrap();
        takes_what_is_planned(&Engine::new(SMALL.model(), by_host).unwrap(), 4, some);
    });
}

fn takes_what_is_planned(engine: &Engine, number_bytes: u64, batches: impl IntoIterator<Item = (KvMode, usize)>) {
    let (here, memory) = (&gpus().unwrap()[0], engine.device().device_memory());
    let host_gather = engine.device().options().host_may_gather();
    let (target, context) = (GpuTarget { host_gather, ..GpuTarget::of(here.n_sms, here.arch) }, 400);
    for (mode, batch) in batches {
        let kv = KvOptions { mode, top_k: 24, ..KvOptions::default() };
        let planned = plan_on_gpu(&engine.model().config, &kv, context, batch, target, number_bytes);
        let mut sessions: Vec<_> = (0..batch).map(|_| engine.session(kv, context).unwrap()).collect();
        for session in &mut sessions {
            prefill(engine, session, &ids(3, 130));
        }
        let mut steps: Vec<_> = sessions.iter_mut().map(|session| Next { session, token: 7 }).collect();
        let mut buffers = Buffers::default();
        engine.decode(&mut steps, &mut buffers).unwrap();
        let caches = batch as u64 * (engine.plan(&kv, context).unwrap().device() + planned.tables);
        let used = [Kind::Kv, Kind::Workspace].map(|kind| memory.used_for(kind));
        assert_eq!(used, [caches, planned.workspace], "{mode:?}, batch {batch}, weights of {number_bytes} bytes");
    }
}

/// What `plan` says of a prompt that is prefilled: as many bytes as the device then has at most.
#[test]
fn plans_are_what_a_prefill_takes() {
    on_gpu("plans_are_what_a_prefill_takes", &[], || {
        for (model, number_bytes) in [(SMALL.model(), 4), (Model::load("synthetic:tiny").unwrap(), 2)] {
            let engine = Engine::new(model, Device::open(&gpu_options()).unwrap()).unwrap();
            let (here, memory, config) = (&gpus().unwrap()[0], engine.device().device_memory(), &engine.model().config);
            for (mode, n) in [(KvMode::Full, 1), (KvMode::Full, 300), (KvMode::Kivi, 350), (KvMode::SpeCache, 400)] {
                let options = KvOptions { mode, ..KvOptions::default() };
                let target = GpuTarget::of(here.n_sms, here.arch);
                let planned = plan_on_gpu(config, &options, n, 1, target, number_bytes);
                let scratch = CacheBytes::prefill_scratch(&KvShape::new(config, &options), &options, n);
                let mut session = engine.session(options, n).unwrap();
                let held = memory.used();
                prefill(&engine, &mut session, &ids(3, n));
                assert_eq!(memory.peak() - held, planned.prefill + scratch, "{mode:?}, {n}, {number_bytes}");
            }
        }
    });
}

fn refuses_and_goes_on(engine: &Engine) {
    for mode in KvMode::ALL {
        let options = kv(mode, 2, 64, 33, 7);
        let why = engine.session(options, 100_000).err().unwrap();
        assert!(why.exit_code() == 4 && why.to_string().contains(" bytes are available"), "{why}");
        let mut session = engine.session(options, 200).unwrap();
        prefill(engine, &mut session, &ids(3, 100));
        let tokens = vec![3; 8000];
        let why = engine.prefill(&mut [Prompt { session: &mut session, tokens: &tokens }], &mut Buffers::default());
        let why = why.err().unwrap();
        assert!(why.exit_code() == 4 && why.to_string().contains("a prefill"), "{why}");
        decode(engine, &mut session, &ids(4, 3), &mut Buffers::default());
    }
}

/// The life of a request, as calls that may fail: what it gave.
fn request(engine: &Engine, mode: KvMode) -> Result<Vec<Vec<f32>>> {
    let (mut rows, mut buffers, tokens) = (vec![], Buffers::default(), ids(9, 300));
    let mut session = engine.session(kv(mode, 2, 64, 33, 7), 160)?;
    let prompt = Prompt { session: &mut session, tokens: &tokens[..156] };
    rows.push(engine.prefill(&mut [prompt], &mut buffers)?.remove(0)?);
    session.reserve(220)?; // more room, behind a prompt
    let mut fork = session.fork()?;
    for &token in &tokens[156..163] {
        let mut batch = [Next { session: &mut session, token }, Next { session: &mut fork, token }];
        engine.decode(&mut batch, &mut buffers)?;
        rows.push(buffers.logits(0)?.to_vec());
        rows.push(buffers.logits(1)?.to_vec());
    }
    if mode != KvMode::Kivi {
        fork.truncate(70)?;
        engine.decode(&mut [Next { session: &mut fork, token: 3 }], &mut buffers)?;
        rows.push(buffers.logits(0)?.to_vec());
    }
    Ok(rows)
}

/// One call of the driver fails: that is an error with a reason, and nothing else; the next request has the right bits.
#[test]
fn a_failed_call() {
    let few = |all: &'static [u32]| if sweeps() { (1..=all[all.len() - 1]).collect() } else { all.to_vec() };
    let calls: [(&str, u32, &[u32]); 17] = [
        ("cuMemAlloc_v2", 2, &[1, 2, 9, 40, 70]),
        ("cuMemHostAlloc", 2, &[1, 3, 5]),
        ("cuMemHostRegister_v2", 2, &[1]),
        ("cuModuleLoadData", 200, &[1, 4]),
        ("cuModuleGetFunction", 500, &[2, 9]),
        ("cuStreamCreateWithPriority", 2, &[2]),
        ("cuEventCreate", 2, &[3]),
        ("cuDevicePrimaryCtxRetain", 2, &[1]),
        ("cuFuncSetAttribute", 1, &[1]),
        ("cuLaunchKernelEx", 701, &[1, 9, 30, 60, 100, 150, 200, 300]),
        ("cuMemcpyHtoDAsync_v2", 1, &[1, 20, 30, 34, 36, 40]),
        ("cuMemcpyDtoHAsync_v2", 1, &[1, 2, 4, 5, 9, 30]),
        ("cuMemcpyDtoDAsync_v2", 1, &[1, 5, 20]),
        ("cuMemsetD8Async", 1, &[1, 9, 60]),
        ("cuEventRecord", 1, &[1, 9, 40, 60, 100]),
        ("cuEventSynchronize", 1, &[1, 9, 40, 60]),
        ("cuStreamWaitEvent", 1, &[1, 5, 20, 60]),
    ];
    // The same where the host gathers, for whom the GPU must not wait then.
    let of_host: [(&str, u32, &[u32]); 7] = [
        ("cuStreamWaitValue32_v2", 1, &[2]),
        ("cuStreamWriteValue32_v2", 1, &[2, 3, 9]),
        ("cuMemHostAlloc", 2, &[4]),
        ("cuLaunchKernelEx", 701, &[76, 79, 82]),
        ("cuMemcpyHtoDAsync_v2", 1, &[34, 37]),
        ("cuEventRecord", 1, &[42]),
        ("cuStreamWaitEvent", 1, &[21]),
    ];
    let calls = calls.map(|call| (call, None)).into_iter().chain(of_host.map(|call| (call, Some(HOST_GATHERS))));
    for ((call, code, counts), way) in calls {
        for count in few(counts) {
            let fault = format!("{call}:{count}:{code}");
            let environment: Vec<_> = way.into_iter().chain([("SPECACHE_EMU_FAIL", fault.as_str())]).collect();
            on_gpu("a_failed_call", &environment, || {
                let mut failures = 0;
                let mut device = || loop {
                    match Device::open(&gpu_options()).and_then(|device| Engine::new(ONE_LAYER.model(), device)) {
                        Ok(engine) => return engine,
                        Err(why) => tells(&why, &mut failures),
                    }
                };
                let engine = device();
                let mut life = |mode| loop {
                    match request(&engine, mode) {
                        Ok(rows) => return rows,
                        Err(why) => tells(&why, &mut failures),
                    }
                };
                let modes: &[KvMode] = if sweeps() { &KvMode::ALL } else { &[KvMode::SpeCache] };
                for &mode in modes {
                    assert!(life(mode) == life(mode), "{mode:?}");
                }
                println!("{failures} failures");
                assert!(failures <= 1);
            });
        }
    }
}

/// The error of an injected failure.
fn tells(why: &Error, failures: &mut u32) {
    println!("{why}");
    assert!([4, 5].contains(&why.exit_code()), "{why}");
    assert!(why.to_string().contains("cu") || why.exit_code() == 4, "{why}");
    *failures += 1;
    assert!(*failures < 5, "for ever: {why}");
}

/// What the host cannot gather fails whoever reads it, at once or with the next step; the next request is right.
#[test]
fn what_the_host_cannot_gather() {
    on_gpu("what_the_host_cannot_gather", &[HOST_GATHERS], || {
        for mode in [KvMode::Fetch, KvMode::SpeCache] {
            let sound = gpu(gpu_options());
            let expected = request(&Engine::new(ONE_LAYER.model(), sound.device.clone()).unwrap(), mode).unwrap();
            let mut gathers = 0;
            for (fault, index) in [(Fault::Copy, 0), (Fault::Copy, 1), (Fault::Copy, 4), (Fault::Worker, 3)] {
                let faults = Arc::new(Faults::at(fault, index));
                let gpu = gpu(DeviceOptions { faults: Some(faults.clone()), ..gpu_options() });
                let engine = Engine::new(ONE_LAYER.model(), gpu.device.clone()).unwrap();
                let first = request(&engine, mode);
                assert!(faults.has_struck(), "{mode:?}, {fault:?} {index}");
                // The first is pages on their way out.
                let why = first.expect_err("what has not come was read").to_string();
                assert!(why.contains("the gather for a GPU failed") || why.contains("could not be copied"), "{why}");
                println!("{fault:?} {index}: {why}");
                gathers += usize::from(why.contains("the gather for a GPU failed"));
                assert!(request(&engine, mode).unwrap() == expected, "{mode:?}, {fault:?} {index}");
            }
            assert_eq!(gathers, 3);
        }
    });
}

/// Two sequences take turns with the same buffers. When one call fails, each of them fails, or goes on with its own bits.
#[test]
fn a_failure_beside_other_sequences() {
    for (call, counts) in
        [("cuLaunchKernelEx", &["280", "310"][..]), ("cuStreamWaitEvent", &["38"]), ("cuEventRecord", &["110"])]
    {
        for count in counts {
            let fault = format!("{call}:{count}:1");
            on_gpu("a_failure_beside_other_sequences", &[HOST_GATHERS, ("SPECACHE_EMU_FAIL", &fault)], || {
                let life = |gather, stop: bool| {
                    let gpu = gpu(DeviceOptions { gather: Some(gather), ..gpu_options() });
                    let engine = Engine::new(SMALL.model(), gpu.device.clone()).unwrap();
                    let (mut buffers, tokens) = (Buffers::default(), ids(9, 300));
                    let mut sessions = [0, 1].map(|_| engine.session(kv(KvMode::SpeCache, 2, 64, 33, 7), 200).unwrap());
                    let mut rows = [vec![], vec![]];
                    for (i, session) in sessions.iter_mut().enumerate() {
                        prefill(&engine, session, &tokens[i..i + 130]); // which comes before the call that fails
                    }
                    for &token in &tokens[140..146] {
                        for (i, session) in sessions.iter_mut().enumerate() {
                            let step = engine.decode(&mut [Next { session: &mut *session, token }], &mut buffers);
                            match step {
                                Ok(()) => rows[i].push(buffers.logits(0).unwrap().to_vec()),
                                Err(why) => {
                                    println!("sequence {i}, step {}: {why}", rows[i].len());
                                    assert!(stop && why.exit_code() == 5, "{why}");
                                }
                            }
                        }
                    }
                    rows
                };
                let (met, sound) = (life(GatherWay::Cpu, true), life(GatherWay::Gpu, false));
                let as_far_as = |(met, sound): (&Vec<Vec<f32>>, &Vec<Vec<f32>>)| *met == sound[..met.len()];
                assert!(met.iter().zip(&sound).all(as_far_as), "{} and {} steps", met[0].len(), met[1].len());
                println!("steps that came: {} and {}", met[0].len(), met[1].len());
            });
        }
    }
}

/// A kernel that fails leaves the GPU lost: every request from then on says so.
#[test]
fn a_lost_gpu() {
    let kernels = ["specache_attn_combine", "specache_select_merge", "specache_fetch_pairs", "specache_embed_fp32"];
    let of_host = ["specache_post_wanted", "specache_fetch_pairs", "specache_attn_combine"];
    let kernels = kernels.map(|kernel| (kernel, None)).into_iter().chain(of_host.map(|k| (k, Some(HOST_GATHERS))));
    for (kernel, way) in kernels {
        let fault = format!("{kernel}:2:719");
        let environment: Vec<_> = way.into_iter().chain([("SPECACHE_EMU_FAIL", fault.as_str())]).collect();
        on_gpu("a_lost_gpu", &environment, || {
            let engine = Engine::new(ONE_LAYER.model(), Device::open(&gpu_options()).unwrap()).unwrap();
            let errors: Vec<Error> = (0..3).filter_map(|_| request(&engine, KvMode::SpeCache).err()).collect();
            let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
            assert!(errors.len() >= 2 && errors.iter().all(|e| e.exit_code() == 5), "{texts:?}");
            assert!(texts.iter().all(|text| text.contains("cu") && text.contains("CUDA_ERROR")), "{texts:?}");
        });
    }
}

/// The binary on the emulated GPU, or on the CPU device where `folder` is `None`.
fn binary(folder: Option<&Path>, arguments: &[&str], environment: &[(&str, &str)]) -> Finished {
    let mut command = Command::new(env!("CARGO_BIN_EXE_specache-engine"));
    if let Some(folder) = folder {
        emulate(&mut command, folder);
    }
    command.args(arguments).envs(environment.iter().copied()).output().unwrap()
}

/// The recall model answers as on the CPU device, in every mode.
#[test]
fn the_recall_model() {
    let Some(folder) = folder() else { return };
    let (model, prompt) = (fixture("recall"), fixture("recall_prompt.txt"));
    let (model, prompt) = (model.to_str().unwrap(), prompt.to_str().unwrap());
    for mode in KvMode::ALL {
        let answer = |folder, device| {
            let kv = ["--kv", mode.name(), "--kv-bits", "1", "--kv-top-k", "16", "--temp", "0", "-n", "5"];
            let arguments = [&["generate", "-m", model, "-f", prompt, "--device", device], &kv[..]].concat();
            let output = binary(folder, &arguments, &[("SPECACHE_CHECK_ORDER", "1")]);
            assert!(output.status.success(), "{}", text(&output));
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.contains(" 0 conflicts") && !said.contains("error: "), "{said}");
            String::from_utf8(output.stdout).unwrap()
        };
        let (ours, theirs) = (answer(Some(folder), "cuda"), answer(None, "cpu"));
        assert_eq!(ours, theirs, "{mode:?}");
        assert!(!ours.trim().is_empty());
    }
}

/// Kernels are compiled once, kept, and compiled anew where what was kept is of no use.
#[test]
fn compiled_kernels_are_kept() {
    let Some(folder) = folder() else { return };
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kept");
    let _ = fs::remove_dir_all(&cache);
    let run = |cache: &Path, environment: &[(&str, &str)]| {
        let tokens = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kept.json");
        fs::write(&tokens, "[1, 2, 3]").unwrap();
        let mut environment = environment.to_vec();
        environment.push(("XDG_CACHE_HOME", cache.to_str().unwrap()));
        let arguments =
            ["generate", "-m", "synthetic:tiny", "--tokens", tokens.to_str().unwrap(), "-n", "2", "--device", "cuda"];
        let output = binary(Some(folder), &arguments, &environment);
        assert!(output.status.success(), "{}", text(&output));
        text(&output)
    };
    let kept = || {
        let files = fs::read_dir(cache.join("specache")).unwrap().map(|file| file.unwrap().path());
        let mut files: Vec<PathBuf> = files.collect();
        files.sort();
        files
    };
    let first = run(&cache, &[]);
    if !first.contains("compiling") {
        return println!("skipped: this program was built with nvcc");
    }
    let files = kept();
    let all = format!("compiling {} kernel files for Emulated GPU", files.len());
    assert!(files.len() > 3 && first.contains(&all), "{first}");
    assert!(!run(&cache, &[]).contains("compiling"));
    // Half a file, and one that no driver takes.
    let whole = fs::read(&files[3]).unwrap();
    fs::write(&files[3], &whole[..whole.len() / 2]).unwrap();
    assert!(run(&cache, &[]).contains("compiling 1 kernel file"));
    assert_eq!(fs::read(&files[3]).unwrap(), whole);
    let again = run(&cache, &[("SPECACHE_EMU_FAIL", "cuModuleLoadData:2:200")]);
    assert!(again.contains("does not load: compiling it anew"), "{again}");
    assert_eq!(kept(), files);
    // Another architecture, or driver, has files of its own.
    assert!(run(&cache, &[("SPECACHE_EMU_CC", "8.0")]).contains(&all));
    assert_eq!(kept().len(), 2 * files.len());
    // Nowhere to keep them: below a file there is no folder, whoever asks.
    let nowhere = run(&files[0], &[]);
    assert!(nowhere.contains(&all) && nowhere.contains("cannot be kept"), "{nowhere}");
}

/// What a GPU's user is told on the command line: the device, and the codes of its failures.
#[test]
fn the_command_line() {
    let Some(folder) = folder() else { return };
    let tokens = Path::new(env!("CARGO_TARGET_TMPDIR")).join("short.json");
    fs::write(&tokens, format!("{:?}", ids(1, 150))).unwrap();
    let generate = ["generate", "-m", "synthetic:tiny", "--tokens", tokens.to_str().unwrap(), "-n", "2"];
    let run = |arguments: &[&str], environment: &[(&str, &str)]| {
        let output = binary(Some(folder), &[&generate, arguments].concat(), environment);
        (output.status.code(), text(&output))
    };
    for (arguments, environment, code, words) in [
        (&["--device", "cuda"][..], &[][..], 0, "Emulated GPU"),
        (&[], &[], 0, "Emulated GPU"),
        (&["--device", "cuda:3"], &[], 2, "cuda:3"),
        (&["--device", "cuda"], &[("SPECACHE_EMU_CC", "7.5")], 5, "too old"),
        (&[], &[("SPECACHE_EMU_CC", "7.5")], 0, ""),
        (&["--device", "cuda", "--vram-budget", "100KiB"], &[], 4, "--vram-budget"),
        (&["--device", "cuda"], &[("SPECACHE_EMU_VRAM", "300000")], 4, "out of device memory"),
        (
            &["--device", "cuda"],
            &[("SPECACHE_EMU_FAIL", "cuLaunchKernelEx:7:701")],
            5,
            "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
        ),
        (&["--device", "cuda"], &[("SPECACHE_EMU_FAIL", "specache_embed_bf16:1:719")], 5, "CUDA_ERROR_LAUNCH_FAILED"),
        // Once would not do: what a background thread could not register, the request tries again.
        (&["--device", "cuda"], &[("SPECACHE_EMU_FAIL", "cuMemHostRegister:1+:304")], 5, "registered"),
    ] {
        let (status, said) = run(arguments, environment);
        let panicked = said.contains("panicked");
        assert!(
            status == Some(code) && said.contains(words) && !panicked,
            "{arguments:?} {environment:?}: {status:?} {said}"
        );
    }
}
