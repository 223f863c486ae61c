//! Sessions beside each other: batches, failures that must stay alone, memory that is planned, held and given back.

mod common;

use common::tiny::{Tiny, VOCAB, ids, with_nan};
use common::{device, kv, options};
use specache::device::{Device, DeviceOptions};
use specache::kv::KvShape;
use specache::kv::cache::CacheBytes;
use specache::kv::{KvMode, KvOptions};
use specache::model::{Dtype, Model};
use specache::session::{Buffers, Next, Prompt, Selections, Session};
use specache::{Engine, Error, Result};

const TINY: Tiny = Tiny { head_dim: 32, n_kv_heads: 2, group_heads: 3, n_layers: 3, window: None };

/// Sequences of all modes and of different lengths: options, prompt length.
fn sequences() -> Vec<(KvOptions, usize)> {
    vec![
        (kv(KvMode::SpeCache, 2, 32, 33, 7), 130),
        (kv(KvMode::Full, 2, 32, 33, 7), 1),
        (kv(KvMode::Kivi, 1, 32, 64, 0), 200),
        (kv(KvMode::Offload, 2, 32, 32, 0), 127),
        (kv(KvMode::Fetch, 1, 32, 33, 16), 193),
        (kv(KvMode::SpeCache, 1, 32, 64, 64), 64),
        (KvOptions { dtype: Some(Dtype::F16), ..kv(KvMode::SpeCache, 4, 32, 100, 5) }, 600),
        (KvOptions { dtype: Some(Dtype::F32), ..kv(KvMode::Full, 2, 32, 33, 7) }, 65),
        (kv(KvMode::SpeCache, 2, 32, 33, 7), 1100),
    ]
}

/// Prefill and `steps` decode steps of some of [`sequences`] together: `[sequence][row]`, or why one failed.
fn decode(engine: &Engine, which: &[usize], steps: usize) -> Vec<Vec<Result<Vec<f32>>>> {
    let all = sequences();
    let tokens: Vec<_> = which.iter().map(|&i| ids(i as u64, all[i].1 + steps)).collect();
    decode_tokens(engine, &which.iter().map(|&i| all[i]).collect::<Vec<_>>(), &tokens)
}

fn decode_tokens(engine: &Engine, sequences: &[(KvOptions, usize)], tokens: &[Vec<u32>]) -> Vec<Vec<Result<Vec<f32>>>> {
    let mut sessions: Vec<Session> =
        sequences.iter().zip(tokens).map(|(s, t)| engine.session(s.0, t.len()).unwrap()).collect();
    let mut buffers = Buffers::default();
    let mut prompts: Vec<Prompt> = sessions
        .iter_mut()
        .zip(sequences.iter().zip(tokens))
        .map(|(session, ((_, len), tokens))| Prompt { session, tokens: &tokens[..*len] })
        .collect();
    let mut rows: Vec<Vec<_>> =
        engine.prefill(&mut prompts, &mut buffers).unwrap().into_iter().map(|r| vec![r]).collect();
    let steps = tokens.iter().zip(sequences).map(|(t, s)| t.len() - s.1).min().unwrap();
    for step in 0..steps {
        let alive: Vec<usize> = (0..rows.len()).filter(|&i| rows[i].iter().all(Result::is_ok)).collect();
        let mut batch: Vec<Next> = sessions
            .iter_mut()
            .enumerate()
            .filter(|(i, _)| alive.contains(i))
            .map(|(i, session)| Next { session, token: tokens[i][sequences[i].1 + step] })
            .collect();
        engine.decode(&mut batch, &mut buffers).unwrap();
        for (at, &i) in alive.iter().enumerate() {
            rows[i].push(buffers.logits(at).map(<[f32]>::to_vec));
        }
    }
    rows
}

fn good(rows: Vec<Result<Vec<f32>>>) -> Vec<Vec<f32>> {
    rows.into_iter().map(Result::unwrap).collect()
}

/// A sequence's bits do not depend on the batch that it is in, on its place there, or on the thread count.
#[test]
fn a_batch_gives_the_bits_of_each_alone() {
    let n = sequences().len();
    let mut alone: Option<Vec<Vec<Vec<f32>>>> = None;
    for threads in [1, 2] {
        let engine = Engine::new(TINY.model(), device(threads)).unwrap();
        let now: Vec<_> = (0..n).map(|i| good(decode(&engine, &[i], 70).remove(0))).collect();
        let before = alone.get_or_insert_with(|| now.clone());
        assert!(*before == now, "{threads} threads");
        let orders = [(0..n).collect::<Vec<_>>(), (0..n).rev().collect(), vec![4, 0, 6], vec![8, 8, 8]];
        for order in orders {
            for (rows, &i) in decode(&engine, &order, 70).into_iter().zip(&order) {
                let rows = good(rows);
                let differs = rows.iter().zip(&now[i]).position(|(a, b)| a != b);
                assert_eq!(differs, None, "sequence {i} in {order:?}, {threads} threads: first row that differs");
            }
        }
    }
}

/// NaN in a weight fails the request, and the message names the layer that made it.
#[test]
fn a_nan_weight_is_named_by_its_layer() {
    for (name, damage) in [
        ("up", (|m: &mut Model| &mut m.weights.layers[1].up) as fn(&mut Model) -> &mut _),
        ("k", |m| &mut m.weights.layers[1].k),
        ("o", |m| &mut m.weights.layers[1].o),
    ] {
        let mut model = TINY.model();
        let linear = damage(&mut model);
        linear.weight = with_nan(&linear.weight, 5, 7);
        let engine = Engine::new(model, device(2)).unwrap();
        for (options, prompt) in sequences() {
            let mut session = engine.session(options, prompt + 1).unwrap();
            let mut buffers = Buffers::default();
            let tokens = ids(3, prompt);
            let prompt = Prompt { session: &mut session, tokens: &tokens };
            let error = engine.prefill(&mut [prompt], &mut buffers).unwrap().remove(0).unwrap_err();
            assert_eq!(error.exit_code(), 1);
            assert!(error.to_string().contains("layer 1 gave NaN"), "{name}: {error}");
            // What is in its cache is of no use to anybody, and every call says so.
            let again = engine.decode(&mut [Next { session: &mut session, token: 1 }], &mut buffers).unwrap_err();
            let others = [session.failure(), session.fork().err(), session.truncate(1).err(), session.reserve(1).err()];
            for again in others.map(Option::unwrap).into_iter().chain([again]) {
                assert_eq!((again.exit_code(), again.to_string()), (1, error.to_string()));
            }
        }
    }
}

/// Token 9's embedding holds a NaN.
fn damaged_token() -> Engine {
    let mut model = TINY.model();
    model.weights.embed = with_nan(&model.weights.embed, 9, 11);
    Engine::new(model, device(2)).unwrap()
}

/// Tokens without number 9.
fn healthy(seed: u64, n: usize) -> Vec<u32> {
    ids(seed, n).into_iter().map(|id| if id == 9 { 10 } else { id }).collect()
}

/// A sequence that meets NaN, in its prompt or in a step, fails alone and names the embedding; the others keep their bits.
#[test]
fn a_nan_fails_one_sequence_alone() {
    let sequences = &sequences()[..7];
    let tokens: Vec<_> = sequences.iter().enumerate().map(|(i, s)| healthy(i as u64, s.1 + 6)).collect();
    let expected: Vec<_> = decode_tokens(&Engine::new(TINY.model(), device(2)).unwrap(), sequences, &tokens);
    let expected: Vec<_> = expected.into_iter().map(good).collect();
    let engine = damaged_token();
    for bad in [0, 3, 4] {
        for row in [0, 1, 3] {
            let mut tokens = tokens.clone();
            // Row 0 comes from the prompt, row r from the r-th token behind it.
            let at = if row == 0 { sequences[bad].1 / 2 } else { sequences[bad].1 + row - 1 };
            tokens[bad][at] = 9;
            for (i, rows) in decode_tokens(&engine, sequences, &tokens).into_iter().enumerate() {
                if i != bad {
                    assert!(good(rows) == expected[i], "sequence {i} beside {bad}");
                    continue;
                }
                assert_eq!(rows.len(), row + 1, "sequence {i} went on");
                for (r, logits) in rows.into_iter().enumerate() {
                    match logits {
                        Ok(logits) => assert!(r < row && logits == expected[i][r]),
                        Err(Error::NotFinite(why)) => assert!(r == row && why.contains("the embedding gave"), "{why}"),
                        Err(other) => panic!("{other}"),
                    }
                }
            }
        }
    }
}

/// Row 0 does not see row 1, whatever row 1 holds: a speculative token that gives NaN costs a guess, not the sequence.
#[test]
fn a_nan_of_the_speculative_row_stays_there() {
    let engine = damaged_token();
    let (options, prompt) = (kv(KvMode::SpeCache, 2, 32, 33, 7), 130);
    let tokens = healthy(5, prompt + 70);
    let run = |speculative: u32| {
        let mut session = engine.session(options, tokens.len()).unwrap();
        session.force_speculative(std::iter::once(speculative).chain((0..70).map(|i| 10 + i % 50)));
        let mut buffers = Buffers::default();
        let first = Prompt { session: &mut session, tokens: &tokens[..prompt] };
        let mut rows = vec![engine.prefill(&mut [first], &mut buffers).unwrap().remove(0).unwrap()];
        for &token in &tokens[prompt..prompt + 3] {
            engine.decode(&mut [Next { session: &mut session, token }], &mut buffers).unwrap();
            rows.push(buffers.logits(0).unwrap().to_vec());
        }
        rows
    };
    let (nan, sound) = (run(9), run(8));
    // The step that is fed the bad guess has the bits of the step that is fed a good one. The next one reads other pairs.
    assert!(nan[..2] == sound[..2]);
    assert!(nan[3].iter().all(|x| x.is_finite()));
}

/// Options of all modes that differ in what they hold.
fn plans() -> Vec<(KvOptions, usize)> {
    let mut plans = vec![];
    for mode in KvMode::ALL {
        for (bits, group_size, residual_len, top_k) in
            [(1, 32, 32, 0), (2, 32, 33, 7), (4, 32, 100, 64), (2, 32, 64, 64)]
        {
            for capacity in [1, 63, 64, 97, 129, 192, 500, 1300] {
                plans.push((kv(mode, bits, group_size, residual_len, top_k), capacity));
            }
        }
    }
    plans
}

/// Device bytes in use, and host bytes that are leased or promised.
fn used(engine: &Engine) -> (u64, u64) {
    let pages = engine.host_pages();
    (engine.device().device_memory().used(), ((pages.leased + pages.reserved) * pages.page_bytes) as u64)
}

/// A session holds what was planned, from its first byte to its last, and the meters say so.
#[test]
fn memory_is_what_was_planned() {
    let engine = Engine::new(TINY.model(), device(2)).unwrap();
    assert_eq!(used(&engine), (0, 0));
    for (options, capacity) in plans() {
        let what = format!("{options:?}, {capacity} tokens");
        let plan = engine.plan(&options, capacity).unwrap();
        let mut session = engine.session(options, capacity).unwrap();
        assert_eq!(session.cache_bytes(), plan, "{what}");
        assert_eq!(used(&engine), (plan.device(), plan.host), "{what}");
        if capacity > 1 {
            let steps = (capacity - 1).min(70);
            let tokens = ids(1, capacity);
            let mut buffers = Buffers::default();
            let prompt = Prompt { session: &mut session, tokens: &tokens[..capacity - steps] };
            engine.prefill(&mut [prompt], &mut buffers).unwrap().remove(0).unwrap();
            assert_eq!(session.cache_bytes(), plan, "{what} after the prefill");
            for &token in &tokens[capacity - steps..] {
                engine.decode(&mut [Next { session: &mut session, token }], &mut buffers).unwrap();
                assert_eq!(used(&engine), (plan.device(), plan.host), "{what} after a step");
            }
            assert_eq!(session.cache_bytes(), plan, "{what} after all steps");
            // It is full to the last token, and says so before anything has changed.
            let more = engine.decode(&mut [Next { session: &mut session, token: 1 }], &mut buffers).unwrap_err();
            assert!(more.exit_code() == 2 && more.to_string().contains("full"), "{more}");
        }
        drop(session);
        assert_eq!(used(&engine), (0, 0), "{what} after the session");
    }
}

fn engine_config() -> specache::model::Config {
    TINY.model().config
}

fn with_budgets(device_budget: Option<u64>, host_budget: Option<u64>) -> Engine {
    let device = Device::cpu(&DeviceOptions { device_budget, host_budget, ..options(1) }).unwrap();
    Engine::new(TINY.model(), device).unwrap()
}

/// A byte too few is refused before anything is allocated; just enough is enough.
#[test]
fn budgets_are_checked_before_anything_is_allocated() {
    for (options, capacity) in plans() {
        let plan = with_budgets(None, None).plan(&options, capacity).unwrap();
        // Room for a prompt of the whole context is part of what is asked for, though not of what is held.
        let shape = KvShape::new(&engine_config(), &options);
        let admitted = plan.device() + CacheBytes::prefill_scratch(&shape, &options, capacity);
        let engine = with_budgets(Some(admitted), Some(plan.host));
        let session = engine.session(options, capacity).unwrap();
        assert_eq!(engine.device().device_memory().available(), admitted - plan.device());
        // A second one does not fit beside it, and takes nothing.
        let error = engine.session(options, capacity).err().unwrap();
        assert_eq!((error.exit_code(), used(&engine)), (4, (plan.device(), plan.host)));
        drop(session);
        assert_eq!(used(&engine), (0, 0));

        let too_small = [(Some(admitted - 1), None, "device"), (None, plan.host.checked_sub(1), "host")];
        for (device_budget, host_budget, memory) in too_small {
            if device_budget.is_none() && host_budget.is_none() {
                continue; // Nothing on the host, so nothing can be missing there.
            }
            let engine = with_budgets(device_budget, host_budget);
            let error = engine.session(options, capacity).err().unwrap();
            assert!(error.exit_code() == 4 && error.to_string().contains(memory), "{error}");
            assert_eq!(used(&engine), (0, 0), "{options:?}");
        }
    }
}

/// A prompt that needs more than the budget is refused before anything has changed: the sessions hold what they held, and
/// go on as if nobody had asked.
#[test]
fn a_prefill_that_does_not_fit_changes_nothing() {
    let tokens = ids(4, 1200);
    for mode in KvMode::ALL {
        let options = kv(mode, 2, 32, 33, 7);
        let free = with_budgets(None, None);
        let plan = free.plan(&options, 300).unwrap();
        // Enough for two sessions and the working pages of short prompts.
        let budget = 2 * plan.device() + 400_000;
        let engine = with_budgets(Some(budget), None);
        let rows = |engine: &Engine, refused: bool| {
            let mut sessions = [engine.session(options, 300).unwrap(), engine.session(options, 300).unwrap()];
            let mut buffers = Buffers::default();
            let mut rows = vec![];
            for session in &mut sessions {
                let prompt = Prompt { session, tokens: &tokens[..250] };
                rows.push(engine.prefill(&mut [prompt], &mut buffers).unwrap().remove(0).unwrap());
            }
            if refused {
                let before = (used(engine), sessions.each_ref().map(Session::cache_bytes));
                let mut prompts = sessions.each_mut().map(|session| Prompt { session, tokens: &tokens[..10] });
                let too_long: Vec<u32> = tokens.iter().copied().cycle().take(200_000).collect();
                prompts[1].tokens = &too_long;
                let error = engine.prefill(&mut prompts, &mut buffers).unwrap_err();
                assert_eq!(error.exit_code(), 4, "{}: {error}", mode.name());
                let after = (used(engine), sessions.each_ref().map(Session::cache_bytes));
                assert_eq!(before, after, "{}", mode.name());
            }
            for &token in &tokens[250..290] {
                let mut batch = sessions.each_mut().map(|session| Next { session, token });
                engine.decode(&mut batch, &mut buffers).unwrap();
                rows.extend([0, 1].map(|i| buffers.logits(i).unwrap().to_vec()));
            }
            rows
        };
        assert!(rows(&engine, true) == rows(&engine, false), "{}", mode.name());
    }
}

/// The figures of a session, against what must come out: guesses that are all right or all wrong, selections of
/// everything, and the bytes of every copy.
#[test]
fn stats_are_exact() {
    let engines = [true, false]
        .map(|delta| Engine::new(TINY.model(), Device::cpu(&DeviceOptions { delta, ..options(2) }).unwrap()).unwrap());
    let (prompt, steps, residual_len) = (130, 70, 33);
    let tokens = ids(6, prompt + steps + 1);
    let pair_bytes = 2 * 32 * 2;
    let page_bytes = 64 * 2 * pair_bytes;
    for (mode, top_k) in [(KvMode::SpeCache, 7), (KvMode::SpeCache, 1000), (KvMode::Fetch, 7), (KvMode::Offload, 0)] {
        for (right, engine) in [true, false].into_iter().flat_map(|right| engines.each_ref().map(|e| (right, e))) {
            let delta = engine.device().options().delta;
            let mut session = engine.session(kv(mode, 2, 32, residual_len, top_k), tokens.len()).unwrap();
            session.keep_trace();
            let shift = u32::from(!right);
            session.force_speculative(tokens[prompt + 1..].iter().map(|t| (t + shift) % VOCAB as u32));
            let mut buffers = Buffers::default();
            let first = Prompt { session: &mut session, tokens: &tokens[..prompt] };
            engine.prefill(&mut [first], &mut buffers).unwrap().remove(0).unwrap();
            for &token in &tokens[prompt..prompt + steps] {
                engine.decode(&mut [Next { session: &mut session, token }], &mut buffers).unwrap();
            }
            let (stats, trace) = (session.stats(), session.trace().unwrap());
            assert_eq!(stats.steps, steps as u64);
            // (130 - 33) / 64 = 1 page of the prompt; 161 and 225 tokens would be the next: one more in each layer.
            assert_eq!(stats.offloaded_bytes, (TINY.n_layers * 2 * page_bytes) as u64);
            if mode == KvMode::Offload {
                // Step 31 ends with 161 tokens and offloads the second page, and step 33 is the first to bring it back.
                let pages = 32 + 2 * (steps - 32);
                assert_eq!(stats.fetched_bytes, (TINY.n_layers * pages * page_bytes) as u64);
                assert_eq!((stats.acceptance(), stats.hit_rate()), (None, None));
                continue;
            }
            let pairs = |selections: &Vec<Vec<Vec<u32>>>| selections.iter().flatten().map(Vec::len).sum::<usize>();
            let selected = trace.steps.iter().map(pairs).sum::<usize>();
            // With delta prefetch: those that the selection before did not have. Selections never shrink here.
            let befores = [&trace.pre_decode].into_iter().chain(&trace.steps);
            let held = befores.zip(&trace.steps).map(|(before, now)| common(before, now)).sum::<usize>();
            let fetched = if delta { selected - held } else { selected };
            assert_eq!(stats.fetched_bytes, (fetched * pair_bytes) as u64, "{mode:?}, delta {delta}");
            assert_eq!(stats.pre_decode_bytes, (pairs(&trace.pre_decode) * pair_bytes) as u64);
            assert_eq!(stats.saved(), Some(1.0 - fetched as f64 / selected as f64));
            assert!(!delta || held > 0, "the case shows nothing");
            if mode == KvMode::Fetch {
                assert_eq!((stats.acceptance(), stats.hit_rate()), (None, None));
                continue;
            }
            // The first step has no step before it.
            assert_eq!(stats.compared, steps as u64 - 1);
            assert_eq!(stats.acceptance(), Some(if right { 1.0 } else { 0.0 }));
            let rate = stats.hit_rate().unwrap();
            assert!(if top_k == 7 { (0.05..0.95).contains(&rate) } else { rate == 1.0 }, "{rate}");
            let of: u64 = (0..TINY.n_layers).map(|l| stats.hits[l].1).sum();
            let low_bit = |step: usize| if step < 32 { 64 } else { 128 };
            let expected = (0..steps).map(|step| top_k.min(low_bit(step)) * 2 * TINY.n_layers).sum::<usize>();
            assert_eq!(of, expected as u64);
        }
    }
}

/// Pairs that two selections have in common.
fn common(a: &Selections, b: &Selections) -> usize {
    let heads = a.iter().flatten().zip(b.iter().flatten());
    heads.map(|(a, b)| a.iter().filter(|p| b.contains(p)).count()).sum()
}

/// Misuse is an error that says what would be right, before anything has changed.
#[test]
fn usage_errors() {
    let engine = Engine::new(TINY.model(), device(1)).unwrap();
    let mut buffers = Buffers::default();
    let mut session = engine.session(kv(KvMode::SpeCache, 2, 32, 33, 7), 10).unwrap();
    let mut decode = |session: &mut Session, token| engine.decode(&mut [Next { session, token }], &mut buffers);
    let empty = decode(&mut session, 1).unwrap_err();
    assert!(empty.exit_code() == 2 && empty.to_string().contains("prefill"), "{empty}");
    let unknown = decode(&mut session, VOCAB as u32).unwrap_err();
    assert!(unknown.exit_code() == 2 && unknown.to_string().contains("ends at 63"), "{unknown}");
    let nothing = engine.prefill(&mut [Prompt { session: &mut session, tokens: &[] }], &mut buffers).unwrap_err();
    assert!(nothing.exit_code() == 2 && nothing.to_string().contains("empty"), "{nothing}");
    for wrong in [kv(KvMode::SpeCache, 3, 32, 33, 7), kv(KvMode::Kivi, 2, 64, 33, 7), kv(KvMode::Fetch, 2, 32, 31, 7)] {
        assert_eq!(engine.session(wrong, 10).err().unwrap().exit_code(), 2, "{wrong:?}");
    }
}

/// Several threads on one engine, each with a session of its own: every mode gives the bits that it gives alone.
#[test]
fn threads_do_not_disturb_each_other() {
    let engine = Engine::new(TINY.model(), device(2)).unwrap();
    let alone: Vec<_> = (0..6).map(|i| decode(&engine, &[i], 40)).collect();
    std::thread::scope(|scope| {
        let run = |i: usize| {
            let engine = &engine;
            scope.spawn(move || decode(engine, &[i % 6], 40))
        };
        let threads: Vec<_> = (0..12).map(run).collect();
        for (i, thread) in threads.into_iter().enumerate() {
            let rows = |run: &[Vec<Result<Vec<f32>>>]| -> Vec<Vec<f32>> {
                run.iter().flatten().map(|row| row.as_ref().unwrap().clone()).collect()
            };
            assert_eq!(rows(&thread.join().unwrap()), rows(&alone[i % 6]), "thread {i}");
        }
    });
}

/// With room for one session only, the next one fits as soon as the one before is gone, whatever was in flight.
#[test]
fn memory_is_back_when_a_session_is_dropped() {
    let options = kv(KvMode::SpeCache, 2, 32, 33, 7);
    let shape = KvShape::new(&engine_config(), &options);
    let plan = with_budgets(None, None).plan(&options, 200).unwrap();
    let budget = plan.device() + CacheBytes::prefill_scratch(&shape, &options, 200) + 200 * 1024;
    let engine = with_budgets(Some(budget), Some(plan.host));
    let tokens = ids(9, 195);
    for _ in 0..50 {
        let mut session = engine.session(options, 200).unwrap();
        let mut buffers = Buffers::default();
        let prompt = Prompt { session: &mut session, tokens: &tokens[..190] };
        engine.prefill(&mut [prompt], &mut buffers).unwrap().remove(0).unwrap();
        engine.decode(&mut [Next { session: &mut session, token: tokens[190] }], &mut buffers).unwrap();
        drop(session);
        assert_eq!(used(&engine), (0, 0));
    }
}

/// Two prefills that fit one by one but not together: one is refused and holds what it held before.
#[test]
fn of_two_prefills_that_race_for_memory_one_is_refused_whole() {
    let options = kv(KvMode::SpeCache, 2, 32, 33, 7);
    let free = with_budgets(None, None);
    let mut one = free.session(options, 100).unwrap();
    let tokens = ids(3, 3000);
    let mut buffers = Buffers::default();
    free.prefill(&mut [Prompt { session: &mut one, tokens: &tokens }], &mut buffers).unwrap().remove(0).unwrap();
    let needed = free.device().device_memory().peak();
    let engine = with_budgets(Some(needed + needed / 3), None);
    for _ in 0..10 {
        let mut sessions = [engine.session(options, 100).unwrap(), engine.session(options, 100).unwrap()];
        let before = sessions.each_ref().map(Session::cache_bytes);
        let results = std::thread::scope(|scope| {
            let run = |session| {
                let (engine, tokens) = (&engine, &tokens[..]);
                scope.spawn(move || {
                    let prompt = Prompt { session, tokens };
                    engine.prefill(&mut [prompt], &mut Buffers::default()).map(|mut rows| rows.remove(0).unwrap())
                })
            };
            sessions.each_mut().map(run).map(|thread| thread.join().unwrap())
        });
        assert!(results.iter().any(Result::is_ok));
        for ((result, session), before) in results.iter().zip(&sessions).zip(before) {
            if let Err(error) = result {
                assert_eq!((error.exit_code(), session.cache_bytes()), (4, before));
            }
        }
    }
    assert_eq!(used(&engine), (0, 0));
}

/// Room is asked for before it is taken, and never beyond what the model supports.
#[test]
fn reserve_changes_nothing_where_it_is_refused() {
    let engine = with_budgets(Some(4 << 20), None);
    for mode in KvMode::ALL {
        let options = kv(mode, 2, 32, 33, 1000);
        let mut session = engine.session(options, 130).unwrap();
        let before = (used(&engine), session.cache_bytes());
        for (tokens, code) in [(1 << 20, 4), (usize::MAX, 2), ((1 << 28) + 1, 2)] {
            assert_eq!(session.reserve(tokens).unwrap_err().exit_code(), code, "{mode:?} {tokens}");
            assert_eq!((used(&engine), session.cache_bytes()), before, "{mode:?} {tokens}");
        }
        assert_eq!(engine.plan(&options, usize::MAX).unwrap_err().exit_code(), 2);
        session.reserve(300).unwrap();
        assert_eq!(session.cache_bytes(), engine.plan(&options, 300).unwrap(), "{mode:?}");
    }
    let dynamic = common::engine(common::fixture("hf/rope_dynamic").to_str().unwrap());
    let most = dynamic.model().config.max_context().unwrap();
    let mut session = dynamic.session(kv(KvMode::Full, 2, 32, 33, 0), most).unwrap();
    assert!(session.reserve(most + 1).unwrap_err().to_string().contains("dynamic RoPE"));
}

/// Growing in the middle of a sequence keeps the selection that the next step waits for: same bits as with room from the
/// start.
#[test]
fn room_made_late_is_as_good_as_room_from_the_start() {
    let engine = Engine::new(TINY.model(), device(1)).unwrap();
    let tokens = ids(5, 420);
    for mode in KvMode::ALL {
        // More slots than fit a short context: growing makes room for them.
        let options = kv(mode, 2, 32, 33, 150);
        let run = |late: bool| {
            let mut session = engine.session(options, if late { 201 } else { 420 }).unwrap();
            let mut buffers = Buffers::default();
            let prompt = Prompt { session: &mut session, tokens: &tokens[..190] };
            engine.prefill(&mut [prompt], &mut buffers).unwrap().remove(0).unwrap();
            let mut rows = vec![];
            for (i, &token) in tokens[190..419].iter().enumerate() {
                if late && i == 10 {
                    session.reserve(420).unwrap();
                }
                engine.decode(&mut [Next { session: &mut session, token }], &mut buffers).unwrap();
                rows.push(buffers.logits(0).unwrap().to_vec());
            }
            rows
        };
        assert_eq!(run(true), run(false), "{mode:?}");
    }
}

/// A session works with the engine that made it, and with no other.
#[test]
fn a_session_of_another_engine_is_refused() {
    let (one, other) = (Engine::new(TINY.model(), device(1)).unwrap(), Engine::new(TINY.model(), device(1)).unwrap());
    let mut session = one.session(kv(KvMode::Full, 2, 32, 33, 0), 10).unwrap();
    let mut buffers = Buffers::default();
    let error = other.prefill(&mut [Prompt { session: &mut session, tokens: &[1] }], &mut buffers).err().unwrap();
    assert!(error.exit_code() == 2 && error.to_string().contains("another engine"), "{error}");
    assert!(buffers.logits(0).unwrap_err().exit_code() == 2);
}
