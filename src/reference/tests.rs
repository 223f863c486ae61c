//! The ops on values worked out by hand, and the decode on tiny random models of every shape.

use super::*;
use crate::device::map::Bytes;
use crate::kv::{KvMode, KvOptions};
use crate::model::{Arch, Config, GenerationConfig, Layer, Model, Weights};

fn matrix(rows: usize, cols: usize, values: &[f32]) -> Matrix {
    let fill = |to: &mut [u8]| to.copy_from_slice(bytemuck::cast_slice(values));
    Matrix::new(Bytes::filled(values.len() * 4, fill).unwrap(), Dtype::F32, rows, cols)
}

#[track_caller]
fn assert_near(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    // A few roundings of f32, relative.
    let near = |a: &f32, b: &f32| (a - b).abs() <= 1e-6 * b.abs().max(1e-3);
    assert!(a.iter().zip(b).all(|(a, b)| near(a, b)), "{a:?} is not {b:?}");
}

#[test]
fn dot_of_any_length() {
    for n in [0, 1, 7, 8, 9, 64, 67] {
        let a: Vec<f32> = (1..=n).map(|i| i as f32).collect();
        assert_eq!(dot(&a, &vec![2.0; n]), (n * (n + 1)) as f32, "{n}");
    }
}

#[test]
fn embed_takes_a_row() {
    assert_eq!(embed(&matrix(3, 2, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), 1), [2.0, 3.0]);
}

#[test]
fn rms_norm_by_hand() {
    // mean(9, 16) = 12.5; epsilon 3.5 makes the root 4.
    assert_eq!(rms_norm(&[3.0, 4.0], &[1.0, 2.0], 3.5), [0.75, 2.0]);
}

#[test]
fn linear_by_hand() {
    let weight = matrix(3, 2, &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
    let x = [1.0, 2.0, 3.0, 4.0];
    let plain = Linear { weight: weight.clone(), bias: None };
    assert_eq!(linear(&plain, &x), [1.0, 2.0, 3.0, 3.0, 4.0, 7.0]);
    let biased = Linear { weight, bias: Some(vec![10.0, 20.0, 30.0]) };
    assert_eq!(linear(&biased, &x), [11.0, 22.0, 33.0, 13.0, 24.0, 37.0]);
    assert!(linear(&biased, &[]).is_empty());
}

#[test]
fn silu_mul_by_hand() {
    // silu(ln 3) = ln 3 * 3 / 4, silu(-ln 3) = -ln 3 / 4.
    let ln3 = 3f32.ln();
    assert_near(&silu_mul(&[0.0, ln3, -ln3], &[5.0, 4.0, 4.0]), &[0.0, 3.0 * ln3, -ln3]);
    assert_eq!(silu_mul(&[-200.0, 200.0], &[1.0, 1.0]), [0.0, 200.0]);
}

fn rope(scaling: RopeScaling) -> Rope {
    Rope { theta: 10_000.0, scaling }
}

#[test]
fn rope_inv_freq_by_hand() {
    let inv_freq = |scaling| rope_inv_freq(&rope(scaling), 8);
    assert_near(&inv_freq(RopeScaling::Default), &[1.0, 0.1, 0.01, 0.001]);
    assert_near(&inv_freq(RopeScaling::Dynamic { factor: 4.0 }), &[1.0, 0.1, 0.01, 0.001]);
    assert_near(&inv_freq(RopeScaling::Linear { factor: 4.0 }), &[0.25, 0.025, 0.0025, 0.00025]);

    // Turns within 4096: 652, 65, 6.5, 0.65. Within 8192 the last makes 1.3038: (1.3038 - 1) / 3 of it is kept.
    let llama3 = |original_max_positions| {
        let (low_freq_factor, high_freq_factor) = (1.0, 4.0);
        inv_freq(RopeScaling::Llama3 { factor: 8.0, low_freq_factor, high_freq_factor, original_max_positions })
    };
    assert_near(&llama3(4096), &[1.0, 0.1, 0.01, 0.000125]);
    assert_near(&llama3(8192), &[1.0, 0.1, 0.01, 2.1360754e-04]);

    // 32 turns at dimension 1.309, 1 turn at 2.814; truncated 1 and 3.
    let yarn = |truncate| inv_freq(yarn(truncate));
    assert_near(&yarn(true), &[1.0, 0.1, 0.01 * (0.5 / 4.0 + 0.5), 0.00025]);
    assert_near(&yarn(false), &[1.0, 0.1, 6.5569715e-03, 0.00025]);
}

fn yarn(truncate: bool) -> RopeScaling {
    let (beta_fast, beta_slow, attention_factor) = (32.0, 1.0, 1.25);
    RopeScaling::Yarn { factor: 4.0, original_max_positions: 4096, beta_fast, beta_slow, attention_factor, truncate }
}

#[test]
fn rope_rotates_halves() {
    let mut x = [1.0, 2.0, 3.0, 4.0];
    rope_rotate(&mut x, &[0.0, 1.0], &[1.0, 0.0]);
    assert_eq!(x, [-3.0, 2.0, 1.0, 4.0]);

    let (cos, sin) = rope_cos_sin(&rope(RopeScaling::Default), 4, 0);
    assert_eq!((cos, sin), (vec![1.0, 1.0], vec![0.0, 0.0]));
    let (cos, sin) = rope_cos_sin(&rope(RopeScaling::Default), 4, 3);
    assert_near(&cos, &[3f32.cos(), 0.03f32.cos()]);
    assert_near(&sin, &[3f32.sin(), 0.03f32.sin()]);
    let (cos, sin) = rope_cos_sin(&rope(yarn(true)), 4, 0);
    assert_eq!((cos, sin), (vec![1.25, 1.25], vec![0.0, 0.0]));
}

#[test]
fn round_kv_to_nearest_even() {
    // bf16 has steps of 1/128 from 1 to 2, fp16 of 1/1024.
    let (bf16, fp16) = (1.0 / 128.0, 1.0 / 1024.0);
    assert_eq!(round_kv(1.0 + 0.5 * bf16, Dtype::Bf16), 1.0);
    assert_eq!(round_kv(1.0 + 1.5 * bf16, Dtype::Bf16), 1.0 + 2.0 * bf16);
    assert_eq!(round_kv(1.0 + 0.5 * fp16, Dtype::F16), 1.0);
    assert_eq!(round_kv(1.0 + 1.5 * fp16, Dtype::F16), 1.0 + 2.0 * fp16);
    assert_eq!(round_kv(0.1, Dtype::F32), 0.1);
}

#[test]
fn quantise_one_bit_by_hand() {
    // Range 0 to 4: the levels are 1 and 3. 2 is in the middle (0.5) and goes to the even code, 0.
    let group = quantise_group(&[0.0, 4.0, 2.0, 2.01, 1.0, 3.0], 1);
    assert_eq!(group, Quantised { codes: vec![0, 1, 0, 1, 0, 1], zero: 1.0, scale: 2.0 });
    assert_eq!(dequantise(&group), [1.0, 3.0, 1.0, 3.0, 1.0, 3.0]);
}

#[test]
fn quantise_more_bits_by_hand() {
    // scale 1: ties go to even codes.
    let group = quantise_group(&[0.0, 3.0, 0.5, 1.5, 2.5, 1.49], 2);
    assert_eq!(group, Quantised { codes: vec![0, 3, 0, 2, 2, 1], zero: 0.0, scale: 1.0 });
    let group = quantise_group(&[-1.0, 14.0, 6.6], 4);
    assert_eq!(group, Quantised { codes: vec![0, 15, 8], zero: -1.0, scale: 1.0 });
}

#[test]
fn quantise_rounds_zero_and_scale_first() {
    // fp16 has steps of 2 from 2048 on; 2049 goes to the even neighbour 2048, and the codes follow.
    let group = quantise_group(&[2049.0, 2050.0, 2052.0], 2);
    assert_eq!(group, Quantised { codes: vec![1, 2, 3], zero: 2048.0, scale: 1.0 });
    assert_eq!(dequantise(&group), [2049.0, 2050.0, 2051.0]);
    // fp16(0.1) = 0.0999755859375 for both.
    let group = quantise_group(&[0.1, 0.2, 0.4], 2);
    assert_eq!(group, Quantised { codes: vec![0, 1, 3], zero: 0.099_975_586, scale: 0.099_975_586 });
}

#[test]
fn quantise_without_range() {
    // All equal; one value; and a range so small that fp16 has only 0 for its scale.
    for values in [&[0.1, 0.1, 0.1][..], &[0.1], &[0.1, 0.100_000_01]] {
        for bits in [1, 2, 4] {
            let group = quantise_group(values, bits);
            assert_eq!(group.codes, vec![0; values.len()]);
            assert_eq!((group.zero, group.scale), (0.099_975_586, 0.0));
        }
    }
}

#[test]
fn quantise_page_by_channel_and_by_token() {
    // K: a channel's value depends on the half of the page only, V: a token's value on the half of the channels only.
    // Groups of 32 then have no range and come back exactly; any other grouping would not.
    let k: Vec<Vec<f32>> = (0..PAGE).map(|t| (0..64).map(|c| (c + 100 * (t / 32)) as f32).collect()).collect();
    let v: Vec<Vec<f32>> = (0..PAGE).map(|t| (0..64).map(|c| (t + 100 * (c / 32)) as f32).collect()).collect();
    let page = quantise_page(&k, &v, 1, 32);
    assert_eq!((page.k.len(), page.k[0].len(), page.k[0][0].codes.len()), (2, 64, 32));
    assert_eq!((page.v.len(), page.v[0].len(), page.v[0][0].codes.len()), (64, 2, 32));
    assert_eq!(dequantise_page(&page), (k.clone(), v.clone()));
    // One group of 64 sees both halves: levels a quarter above and below.
    let (wide_k, wide_v) = dequantise_page(&quantise_page(&k, &v, 1, 64));
    assert_eq!((wide_k[0][7], wide_k[63][7]), (32.0, 82.0));
    assert_eq!((wide_v[7][0], wide_v[7][63]), (32.0, 82.0));
}

#[test]
fn softmax_by_hand() {
    assert_near(&softmax(&[0.0, 3f32.ln()]), &[0.25, 0.75]);
    assert_eq!(softmax(&[1000.0, 1000.0, f32::NEG_INFINITY]), [0.5, 0.5, 0.0]);
    assert!(softmax(&[]).is_empty());
}

#[test]
fn sees_is_causal_and_windowed() {
    let seen = |window| (0..8).filter(|&j| sees(5, j, window)).collect::<Vec<_>>();
    assert_eq!(seen(None), [0, 1, 2, 3, 4, 5]);
    assert_eq!(seen(Some(2)), [4, 5]);
    assert_eq!(seen(Some(6)), [0, 1, 2, 3, 4, 5]);
    assert_eq!(seen(Some(usize::MAX / 2)), [0, 1, 2, 3, 4, 5]);
}

#[test]
fn attention_by_hand() {
    // head_dim 4: q k / 2 is 0 or ln 3.
    let (zero, one) = ([0.0; 4], [2.0 * 3f32.ln(), 0.0, 0.0, 0.0]);
    let values = [[8.0, 0.0, 0.0, 0.0], [0.0, 8.0, 0.0, 0.0], [0.0, 0.0, 8.0, 0.0]];
    let keys = [&zero, &one, &zero];
    let pairs: Vec<Pair> = (0..3).map(|i| Pair { position: i, k: keys[i], v: &values[i] }).collect();
    let q = [1.0, 0.0, 0.0, 0.0];
    let (out, p) = attention(&q, 1, &pairs, None);
    assert_near(&p, &[0.25, 0.75, 0.0]);
    assert_near(&out, &[2.0, 6.0, 0.0, 0.0]);
    let (out, p) = attention(&q, 2, &pairs, Some(2));
    assert_near(&p, &[0.0, 0.75, 0.25]);
    assert_near(&out, &[0.0, 6.0, 2.0, 0.0]);
}

#[test]
fn mean_probabilities_by_hand() {
    assert_eq!(mean_probabilities(&[vec![0.25, 0.75], vec![0.75, 0.25], vec![0.5, 0.5]]), [0.5, 0.5]);
}

#[test]
fn top_k_ties_go_to_the_lower_position() {
    let scores = [0.1, 0.4, 0.1, 0.4, 0.1];
    for (k, expected) in [(0, &[][..]), (1, &[1]), (2, &[1, 3]), (3, &[0, 1, 3]), (4, &[0, 1, 2, 3])] {
        assert_eq!(top_k(&scores, k), expected, "{k}");
    }
    assert_eq!(top_k(&scores, 9), [0, 1, 2, 3, 4]);
    assert_eq!(top_k(&[], 3), [0u32; 0]);
    assert_eq!(top_k(&[-0.0, 0.0], 1), [0]);
}

#[test]
fn argmax_ties_go_to_the_lower_id() {
    assert_eq!(argmax(&[1.0, 3.0, 2.0, 3.0]), 1);
    assert_eq!(argmax(&[-1.0]), 0);
}

#[test]
fn kl_divergence_by_hand() {
    // p = (1/4, 3/4), q = (1/2, 1/2): 1/4 ln(1/2) + 3/4 ln(3/2).
    let expected = 0.25 * 0.5f64.ln() + 0.75 * 1.5f64.ln();
    assert!((kl_divergence(&[0.0, 3f32.ln()], &[7.0, 7.0]) - expected).abs() < 1e-7);
    assert_eq!(kl_divergence(&[1.0, 2.0, -5.0], &[1.0, 2.0, -5.0]), 0.0);
    // p has nothing where q has half.
    assert!((kl_divergence(&[0.0, f32::NEG_INFINITY], &[0.0, 0.0]) - 2f64.ln()).abs() < 1e-7);
}

/// Uniform in `-1 .. 1` (SplitMix64).
fn random(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// Two layers, G = 3, head_dim 32, not tied; biases and q, k norms if `extras`.
fn tiny(window: Option<usize>, scaling: RopeScaling, extras: bool, dtype: Option<Dtype>) -> Model {
    let config = Config {
        arch: Arch::Llama,
        hidden_size: 20,
        intermediate_size: 28,
        n_layers: 2,
        n_heads: 6,
        n_kv_heads: 2,
        head_dim: 32,
        vocab_size: 50,
        max_positions: 4096,
        rms_norm_eps: 1e-6,
        rope: Rope { theta: 10_000.0, scaling },
        sliding_window: window,
        tie_word_embeddings: false,
        qkv_bias: extras,
        o_bias: extras,
        mlp_bias: extras,
        qk_norm: extras,
        dtype,
        bos_token_id: None,
        eos_token_ids: vec![],
    };
    let mut state = 1;
    let mut values =
        |n: usize, size: f32, mean: f32| -> Vec<f32> { (0..n).map(|_| random(&mut state) * size + mean).collect() };
    let (hidden, heads, kv_heads) = (20, 6 * 32, 2 * 32);
    let mut linear = |rows: usize, cols: usize| Linear {
        weight: matrix(rows, cols, &values(rows * cols, 2.0 / (cols as f32).sqrt(), 0.0)),
        bias: extras.then(|| values(rows, 0.5, 0.0)),
    };
    let mut layers = Vec::new();
    for _ in 0..config.n_layers {
        layers.push(Layer {
            input_norm: vec![1.5; hidden],
            q: linear(heads, hidden),
            k: linear(kv_heads, hidden),
            v: linear(kv_heads, hidden),
            o: linear(hidden, heads),
            q_norm: extras.then(|| vec![1.25; 32]),
            k_norm: extras.then(|| vec![0.75; 32]),
            post_norm: vec![0.5; hidden],
            gate: linear(28, hidden),
            up: linear(28, hidden),
            down: linear(hidden, 28),
        });
    }
    let lm_head = Linear { bias: None, ..linear(50, hidden) };
    let weights = Weights { embed: linear(50, hidden).weight, layers, final_norm: vec![1.0; hidden], lm_head };
    Model { name: "tiny".into(), config, weights, generation: GenerationConfig::default(), synthetic: true }
}

/// Every feature of a model at least once.
fn models() -> Vec<Model> {
    vec![
        tiny(None, RopeScaling::Default, false, None),
        tiny(Some(40), RopeScaling::Linear { factor: 2.0 }, true, Some(Dtype::F16)),
        tiny(Some(150), yarn(true), true, Some(Dtype::Bf16)),
    ]
}

fn options(mode: KvMode, bits: usize, residual_len: usize, top_k: usize) -> KvOptions {
    KvOptions { mode, bits, group_size: 32, residual_len, top_k, dtype: None }
}

fn ids(n: usize) -> Vec<u32> {
    let mut state = 7;
    (0..n).map(|_| ((random(&mut state) + 1.0) * 24.9) as u32).collect()
}

#[test]
fn full_decode_equals_prefill() {
    let ids = ids(100);
    for model in models() {
        for mode in [KvMode::Full, KvMode::Offload] {
            let kv = options(mode, 1, 32, 4);
            let run = teacher_forced(&model, &kv, &ids, 70, None);
            assert_eq!(run.logits.len(), 30);
            for (row, n) in run.logits.iter().zip(70..) {
                assert_eq!(*row, Session::new(&model, &kv).prefill(&ids[..n]), "{n} tokens");
            }
        }
    }
}

#[test]
fn window_hides_what_is_behind_it() {
    // Two layers with window 40: the last of n tokens depends on the last 79 of them, and on the 79th last.
    let model = &models()[1];
    let kv = options(KvMode::Full, 1, 32, 0);
    let ids = ids(100);
    let logits = |changed: usize| {
        let mut ids = ids.clone();
        ids[changed] = (ids[changed] + 1) % 50;
        Session::new(model, &kv).prefill(&ids)
    };
    let unchanged = Session::new(model, &kv).prefill(&ids);
    assert_eq!(logits(100 - 80), unchanged);
    assert_ne!(logits(100 - 79), unchanged);
}

#[test]
fn invariants_of_k() {
    let ids = ids(260);
    for model in models() {
        for bits in [1, 2, 4] {
            let run = |mode, k| teacher_forced(&model, &options(mode, bits, 32, k), &ids, 150, None);
            let (full, kivi) = (run(KvMode::Full, 0), run(KvMode::Kivi, 0));
            assert_ne!(full.logits, kivi.logits);
            for mode in [KvMode::SpeCache, KvMode::Fetch] {
                assert_eq!(run(mode, 0).logits, kivi.logits);
                assert_eq!(run(mode, 260).logits, full.logits);
            }
        }
    }
}

#[test]
fn counters() {
    let model = &models()[0];
    let kv = options(KvMode::SpeCache, 2, 40, 4);
    for (n, expected) in [(1, 0), (40, 0), (41, 0), (103, 0), (104, 64), (105, 64), (168, 128)] {
        let mut session = Session::new(model, &kv);
        session.prefill(&ids(n));
        assert_eq!((session.n, session.no, session.nq), (n, expected, expected));
    }
    let mut session = Session::new(model, &kv);
    session.prefill(&ids(102));
    // (n, no, nq) after a step: 64 tokens are offloaded when n reaches 40 + 64, and low-bit one step later.
    for after in [(103, 0, 0), (104, 64, 0), (105, 64, 64), (106, 64, 64)] {
        session.step(1, Some(2));
        assert_eq!((session.n, session.no, session.nq), after);
    }
}

#[test]
fn selections_are_visible_candidates() {
    for model in models() {
        for mode in [KvMode::SpeCache, KvMode::Fetch] {
            let mut session = Session::new(&model, &options(mode, 2, 40, 30));
            session.prefill(&ids(102));
            let speculates = mode == KvMode::SpeCache;
            if speculates {
                session.pre_decode(1);
            }
            for _ in 0..70 {
                // Row 1 of SpeCache selects among what is offloaded, fetch's row 0 among what is low-bit.
                let (n, end) = if speculates { (session.n + 1, session.no) } else { (session.n, session.nq) };
                session.step(1, speculates.then_some(2));
                let candidates = (0..end).filter(|&j| sees(n, j, model.config.sliding_window)).count();
                for head in session.selected.iter().flatten() {
                    assert_eq!(head.len(), candidates.min(30));
                    assert!(head.is_sorted());
                    assert!(head.iter().all(|&j| sees(n, j as usize, model.config.sliding_window)));
                    assert!(head.iter().all(|&j| (j as usize) < end));
                }
            }
        }
    }
}

#[test]
fn continued_prefill_is_exact_but_in_kivi() {
    let ids = ids(180);
    for model in models() {
        for mode in KvMode::ALL {
            let kv = options(mode, 1, 32, 8);
            let mut whole = Session::new(&model, &kv);
            let at_once = whole.prefill(&ids);
            let mut session = Session::new(&model, &kv);
            session.prefill(&ids[..120]);
            assert_eq!(session.no, 64);
            let in_two = session.prefill(&ids[120..]);
            // A window of 40 at position 120 sees nothing of the low-bit page in either layer.
            let exact = mode != KvMode::Kivi || model.config.sliding_window == Some(40);
            assert_eq!(in_two == at_once, exact, "{}", mode.name());
            assert_eq!((session.n, session.no, session.nq), (180, 128, 128));
            assert!(session.selected.iter().flatten().all(Vec::is_empty));
            if mode == KvMode::SpeCache {
                assert_eq!(session.pre_decode(3), whole.pre_decode(3));
                assert_eq!(session.step(3, Some(4)), whole.step(3, Some(4)));
            }
        }
    }
}

#[test]
fn speculative_row_does_not_touch_the_real_one() {
    let ids = ids(130);
    for model in models() {
        let row_0 = |k: usize, speculative: u32| {
            let mut session = Session::new(&model, &options(KvMode::SpeCache, 1, 32, k));
            session.prefill(&ids);
            session.pre_decode(1);
            session.step(1, Some(speculative)).swap_remove(0)
        };
        assert_eq!(row_0(8, 2), row_0(8, 3));
    }
}

#[test]
fn forced_speculative_tokens_are_fed_and_own_ones_reported() {
    let (model, ids) = (&models()[0], ids(140));
    let kv = options(KvMode::SpeCache, 1, 32, 8);
    let own = teacher_forced(model, &kv, &ids, 120, None);
    assert_eq!((own.logits.len(), own.speculative.len(), own.steps.len(), own.pre_decode.len()), (20, 19, 19, 2));
    assert_eq!(teacher_forced(model, &kv, &ids, 120, Some(&own.speculative)), own);
    let forced: Vec<u32> = own.speculative.iter().map(|t| (t + 1) % 50).collect();
    let other = teacher_forced(model, &kv, &ids, 120, Some(&forced));
    assert_eq!(other.speculative[0], own.speculative[0]);
    assert_ne!(other.steps, own.steps);
}
