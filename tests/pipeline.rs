//! The pipeline of copies: the same bits under every schedule, every wait needed and none missing, faults that stay where
//! they happen.

mod common;

use std::sync::{Arc, Mutex};

use common::tiny::{Tiny, ids};
use common::{fixture, json, kv, options};
use specache::device::link::LinkOptions;
use specache::device::order::{Checker, Conflict, Resource};
use specache::device::trace::Slice;
use specache::device::{Device, DeviceOptions, Schedule};
use specache::kv::{KvMode, KvOptions};
use specache::sampler::argmax;
use specache::{Buffers, Engine, Next, Prompt, Result, Session};

const TINY: Tiny = Tiny { head_dim: 32, n_kv_heads: 2, group_heads: 3, n_layers: 3, window: None };

/// Modes with a host copy, and the two without.
fn modes() -> Vec<KvOptions> {
    KvMode::ALL.into_iter().map(|mode| kv(mode, 1, 32, 33, 7)).collect()
}

fn engine(model: &Tiny, options: DeviceOptions) -> Engine {
    Engine::new(model.model(), Device::cpu(&options).unwrap()).unwrap()
}

/// Prefills one session behind what it holds.
fn prefill(engine: &Engine, session: &mut Session, tokens: &[u32], rows: &mut Vec<Vec<f32>>) -> Result<()> {
    rows.push(engine.prefill(&mut [Prompt { session, tokens }], &mut Buffers::default())?.remove(0)?);
    Ok(())
}

/// Feeds tokens to several sessions at once, a different one to each.
fn decode(
    engine: &Engine,
    sessions: &mut [&mut Session],
    tokens: &[u32],
    buffers: &mut Buffers,
    rows: &mut Vec<Vec<f32>>,
) -> Result<()> {
    for &token in tokens {
        let mut batch: Vec<Next> = sessions
            .iter_mut()
            .enumerate()
            .map(|(i, session)| Next { session, token: (token + 5 * i as u32) % 64 })
            .collect();
        engine.decode(&mut batch, buffers)?;
        for i in 0..sessions.len() {
            rows.push(buffers.logits(i)?.to_vec());
        }
    }
    Ok(())
}

/// Two sequences through all that a cache can meet: prompts, steps over page borders, a second prompt, a fork, more room, a
/// truncation. All logits on the way.
fn life(engine: &Engine, kv: KvOptions) -> Result<Vec<Vec<f32>>> {
    let (mut rows, mut buffers) = (Vec::new(), Buffers::default());
    let tokens = ids(3, 700);
    // Long enough that its third layer is computed in the pages that the first one was sent out from.
    let mut long = engine.session(kv, 600)?;
    prefill(engine, &mut long, &tokens[..600], &mut rows)?;
    prefill(engine, &mut long, &tokens[600..], &mut rows)?;
    drop(long);
    let mut a = engine.session(kv, 280)?;
    let mut b = engine.session(kv, 300)?;
    prefill(engine, &mut a, &tokens[..130], &mut rows)?;
    prefill(engine, &mut b, &tokens[50..220], &mut rows)?;
    decode(engine, &mut [&mut a, &mut b], &tokens[130..170], &mut buffers, &mut rows)?;
    prefill(engine, &mut a, &tokens[220..290], &mut rows)?;
    decode(engine, &mut [&mut a, &mut b], &tokens[290..300], &mut buffers, &mut rows)?;
    let mut fork = a.fork()?;
    a.reserve(380)?;
    decode(engine, &mut [&mut fork, &mut a, &mut b], &tokens[300..308], &mut buffers, &mut rows)?;
    // In kivi, pairs that would become the residual are gone: the last ones can still be forgotten.
    let keep = if kv.mode == KvMode::Kivi { a.n_tokens() - 3 } else { 100 };
    a.truncate(keep)?;
    drop(b);
    decode(engine, &mut [&mut a, &mut fork], &tokens[310..316], &mut buffers, &mut rows)?;
    a.truncate(a.n_tokens() - 1)?;
    prefill(engine, &mut a, &tokens[316..390], &mut rows)?;
    decode(engine, &mut [&mut a], &tokens[390..395], &mut buffers, &mut rows)?;
    Ok(rows)
}

/// A sequence with a residual of several pages, all of whose room is there from the beginning: prompts that follow each
/// other at once, while pages of the first are still on their way to the host; a truncation that brings low-bit pages
/// back to the residual.
fn deep_life(engine: &Engine, kv: KvOptions) -> Result<Vec<Vec<f32>>> {
    let kv = KvOptions { residual_len: 200, ..kv };
    let (mut rows, mut buffers) = (Vec::new(), Buffers::default());
    let tokens = ids(5, 900);
    let mut session = engine.session(kv, 800)?;
    prefill(engine, &mut session, &tokens[..500], &mut rows)?;
    prefill(engine, &mut session, &tokens[500..570], &mut rows)?;
    decode(engine, &mut [&mut session], &tokens[570..580], &mut buffers, &mut rows)?;
    prefill(engine, &mut session, &tokens[580..700], &mut rows)?;
    decode(engine, &mut [&mut session], &tokens[700..770], &mut buffers, &mut rows)?;
    let keep = if kv.mode == KvMode::Kivi { session.n_tokens() - 3 } else { 250 };
    session.truncate(keep)?;
    decode(engine, &mut [&mut session], &tokens[770..790], &mut buffers, &mut rows)?;
    prefill(engine, &mut session, &tokens[800..810], &mut rows)?;
    decode(engine, &mut [&mut session], &tokens[810..813], &mut buffers, &mut rows)?;
    Ok(rows)
}

/// Devices that differ in how copies are waited for and made, and in nothing that a result may depend on.
fn devices() -> Vec<(String, DeviceOptions)> {
    let mut devices = vec![];
    for pipeline in Schedule::ALL {
        for delta in [true, false] {
            for gather_threads in [1, 3] {
                let what = format!("{}, delta {delta}, {gather_threads} gather threads", pipeline.name());
                let gather_threads = Some(gather_threads);
                devices.push((what, DeviceOptions { pipeline, delta, gather_threads, ..options(2) }));
            }
        }
        let link = LinkOptions { gbps: Some(0.05), latency_us: 30.0 };
        devices.push((format!("{}, a slow link", pipeline.name()), DeviceOptions { pipeline, link, ..options(2) }));
    }
    devices
}

#[test]
fn every_schedule_gives_the_same_bits() {
    for kv in modes() {
        let mut first: Option<Vec<Vec<f32>>> = None;
        for (what, device) in devices() {
            let engine = engine(&TINY, device);
            let rows = [life(&engine, kv).unwrap(), deep_life(&engine, kv).unwrap()].concat();
            let expected = first.get_or_insert_with(|| rows.clone());
            let differs = rows.iter().zip(&*expected).position(|(a, b)| a != b);
            assert_eq!((differs, rows.len()), (None, expected.len()), "{:?}, {what}", kv.mode);
        }
    }
}

/// Greedy tokens of the recall model.
fn recall_tokens(options: DeviceOptions, kv: KvOptions, steps: usize) -> (Vec<u32>, Session) {
    let engine = Engine::load(fixture("recall").to_str().unwrap(), &options).unwrap();
    let prompts: Vec<serde_json::Value> = json(fixture("recall_prompts.json"));
    let prompt: Vec<u32> = serde_json::from_value(prompts[0]["ids"].clone()).unwrap();
    let mut session = engine.session(kv, prompt.len() + steps + 1).unwrap();
    let mut buffers = Buffers::default();
    let first = Prompt { session: &mut session, tokens: &prompt };
    let mut tokens = vec![argmax(&engine.prefill(&mut [first], &mut buffers).unwrap().remove(0).unwrap())];
    for _ in 0..steps {
        let token = tokens[tokens.len() - 1];
        engine.decode(&mut [Next { session: &mut session, token }], &mut buffers).unwrap();
        tokens.push(argmax(buffers.logits(0).unwrap()));
    }
    (tokens, session)
}

#[test]
fn the_recall_models_tokens_are_the_same_under_every_schedule() {
    for mode in KvMode::ALL {
        let kv = kv(mode, 1, 64, 64, 16);
        let mut first: Option<Vec<u32>> = None;
        for pipeline in Schedule::ALL {
            for delta in [true, false] {
                let order = Arc::new(Mutex::new(Checker::new()));
                let options = DeviceOptions { pipeline, delta, order: Some(order.clone()), ..options(2) };
                let (tokens, _) = recall_tokens(options, kv, 80);
                let expected = first.get_or_insert_with(|| tokens.clone());
                assert_eq!(*expected, tokens, "{mode:?}, {}, delta {delta}", pipeline.name());
                let order = order.lock().unwrap();
                assert_eq!(order.conflicts(), [], "{mode:?}, {}, delta {delta}", pipeline.name());
                assert!(order.operations() > 1000);
            }
        }
    }
}

/// What the checker says of two lives in one mode, with the waits at one site taken out of what the program promises.
fn check(kv: KvOptions, pipeline: Schedule, ignored: Option<&'static str>) -> (Vec<Conflict>, Vec<&'static str>) {
    let mut checker = Checker::new();
    if let Some(site) = ignored {
        checker.ignore(site);
    }
    let order = Arc::new(Mutex::new(checker));
    let engine = engine(&TINY, DeviceOptions { pipeline, order: Some(order.clone()), ..options(1) });
    life(&engine, kv).unwrap();
    deep_life(&engine, kv).unwrap();
    let order = order.lock().unwrap();
    (order.conflicts().to_vec(), order.sites().collect())
}

/// Waits without which these lives meet no conflict: mode, schedule, place, and why not.
const HARMLESS: [(&str, &str, &str, &str); 10] = [
    ("full", "stream", ALL, "nothing is copied"),
    ("kivi", "stream", ALL, "nothing is copied"),
    ("fetch", "stream", ALL, "a fetch is waited for where it is issued"),
    ("fetch", "serial", STAGING, "as above, so the block is free when the next gather is issued"),
    ("fetch", "event", STAGING, "as above"),
    ("specache", "serial", STAGING, "as in fetch"),
    ("offload", "stream", LOADED_BEFORE, "the prompt waits for what it loads itself, behind them in the same stream"),
    ("offload", "event", LOADED_BEFORE, "as above"),
    ("specache", "stream", PAIRS_BEFORE, "as above"),
    ("specache", "event", PAIRS_BEFORE, "as above"),
];
const ALL: &str = "all copies arrive before attention";
const STAGING: &str = "a staging block is free before a gather";
const LOADED_BEFORE: &str = "loaded pages are here before a prompt";
const PAIRS_BEFORE: &str = "prefetched pairs are here before a prompt";

/// No conflict with all waits; and without any one of them the checker names two operations that meet.
#[test]
fn every_wait_is_needed_and_none_is_missing() {
    let mut survivors = vec![];
    for kv in modes() {
        for pipeline in Schedule::ALL {
            let (mode, schedule) = (kv.mode.name(), pipeline.name());
            let (conflicts, sites) = check(kv, pipeline, None);
            assert!(conflicts.is_empty(), "{mode}, {schedule}: {}", conflicts[0]);
            for site in sites {
                let (conflicts, _) = check(kv, pipeline, Some(site));
                match conflicts.first() {
                    Some(conflict) => println!("{mode}, {schedule}, without \"{site}\": {conflict}"),
                    None => survivors.push((mode, schedule, site)),
                }
            }
        }
    }
    let known = |&(mode, schedule, site): &(&str, &str, &str)| {
        HARMLESS.iter().any(|&(m, s, place, _)| (m, s, place) == (mode, schedule, site))
    };
    let unknown: Vec<_> = survivors.iter().filter(|survivor| !known(survivor)).collect();
    assert!(unknown.is_empty(), "waits without which the checker finds no conflict: {unknown:#?}");
    for (mode, schedule, place, why) in HARMLESS {
        assert!(
            survivors.contains(&(mode, schedule, place)),
            "{mode}, {schedule}: \"{place}\" is needed after all ({why})"
        );
    }
}

/// A host page that was given back while a gather still read it, and went to the next sequence: the checker knows it
/// again.
#[test]
fn a_host_page_that_is_freed_too_early_is_caught() {
    let kv = kv(KvMode::SpeCache, 1, 32, 33, 7);
    let tokens = ids(8, 300);
    let reused = |ignored: Option<&'static str>| {
        let mut checker = Checker::new();
        ignored.into_iter().for_each(|site| checker.ignore(site));
        let order = Arc::new(Mutex::new(checker));
        let engine = engine(&TINY, DeviceOptions { order: Some(order.clone()), ..options(1) });
        for _ in 0..2 {
            let mut session = engine.session(kv, 300).unwrap();
            prefill(&engine, &mut session, &tokens[..200], &mut vec![]).unwrap();
            decode(&engine, &mut [&mut session], &tokens[200..203], &mut Buffers::default(), &mut vec![]).unwrap();
            // The gathers of its last step may still be under way: its end waits for them, before it frees its pages.
        }
        let order = order.lock().unwrap();
        let conflict = |c: &&Conflict| {
            matches!(c.resource, Resource::HostPage(..))
                && (c.earlier.operation, c.later.operation) == ("gather", "page out")
        };
        (order.conflicts().len(), order.conflicts().iter().filter(conflict).count())
    };
    assert_eq!(reused(None), (0, 0));
    let (_, caught) = reused(Some("prefetched pairs are here before a cache rests"));
    assert!(caught > 0);
}

/// What ran, after `session` has come to rest.
fn slices(engine: &Engine, session: &mut Session) -> Vec<Slice> {
    session.reserve(session.max_tokens() + 100).unwrap();
    engine.device().trace().unwrap().take()
}

/// `offload`: every step brings each layer back once, named by its own number, and begins with the first two of the next
/// step, unless something happens to the session in between.
#[test]
fn whole_layers_come_back_across_steps() {
    let (kv, tokens) = (kv(KvMode::Offload, 1, 32, 33, 7), ids(8, 400));
    for n_layers in 1..=4 {
        let model = Tiny { n_layers, ..TINY };
        let engine = engine(&model, DeviceOptions { trace: true, ..options(1) });
        let mut session = engine.session(kv, 300).unwrap();
        let loads = |session: &mut Session| {
            let slices = slices(&engine, session);
            let loads = slices.iter().filter(|slice| slice.name == "load");
            let mut counts = vec![0; n_layers];
            loads.for_each(|load| counts[load.place.layer.expect("a load is of a layer") as usize] += 1);
            counts
        };
        // Over the end of a page, so that what comes back grows.
        let steps = |session: &mut Session, tokens: &[u32]| {
            let before = session.stats().fetched_bytes;
            decode(&engine, &mut [session], tokens, &mut Buffers::default(), &mut vec![]).unwrap();
            session.stats().fetched_bytes - before
        };
        let ahead = |n: usize| (0..n_layers).map(|l| n + usize::from(l < 2)).collect::<Vec<_>>();
        prefill(&engine, &mut session, &tokens[..150], &mut vec![]).unwrap();
        loads(&mut session);
        steps(&mut session, &tokens[150..190]);
        assert_eq!(loads(&mut session), ahead(40), "{n_layers} layers");
        // Bytes are those of the steps that use them: two pages a layer.
        let bytes = steps(&mut session, &tokens[190..193]);
        assert_eq!(bytes, 3 * 2 * (n_layers * 64 * 2 * 2 * 2 * 32) as u64, "{n_layers} layers");
        assert_eq!(loads(&mut session), ahead(3), "{n_layers} layers");
        steps(&mut session, &tokens[193..194]);
        let mut fork = session.fork().unwrap();
        steps(&mut session, &tokens[194..195]);
        steps(&mut fork, &tokens[194..195]);
        drop(fork);
        assert_eq!(loads(&mut session), ahead(1).iter().map(|n| 3 * n).collect::<Vec<_>>(), "{n_layers} layers");
    }
}

/// The waits of a pre-decode are no step's, as its bytes are not.
#[test]
fn a_pre_decode_is_not_counted_as_a_step() {
    let (kv, tokens) = (kv(KvMode::SpeCache, 1, 32, 33, 7), ids(8, 400));
    for pipeline in Schedule::ALL {
        let link = LinkOptions { gbps: None, latency_us: 3000.0 };
        let engine = engine(&TINY, DeviceOptions { pipeline, link, trace: true, ..options(1) });
        let mut session = engine.session(kv, 300).unwrap();
        prefill(&engine, &mut session, &tokens[..150], &mut vec![]).unwrap();
        decode(&engine, &mut [&mut session], &tokens[150..151], &mut Buffers::default(), &mut vec![]).unwrap();
        let (exposed, pre_decode) = (session.stats().exposed, session.stats().pre_decode_bytes);
        assert!(pre_decode > 0);
        let slices = slices(&engine, &mut session);
        let step = slices.iter().map(|slice| slice.place.step).max().unwrap();
        let waits = slices.iter().filter(|slice| slice.waits && slice.place.step == step);
        let waited: f64 = waits.map(Slice::us).sum();
        assert!(exposed.as_secs_f64() * 1e6 <= waited, "{}: {exposed:?} of {waited} us", pipeline.name());
    }
}

/// Buffers may serve two batches in turns: neither waits for what the other has on its way, and each has its own bits.
#[test]
fn buffers_serve_batches_in_turns() {
    let kv = kv(KvMode::SpeCache, 1, 32, 33, 7);
    let tokens = ids(8, 300);
    for pipeline in Schedule::ALL {
        let order = Arc::new(Mutex::new(Checker::new()));
        // Slow enough that a copy is still on its way when the other batch comes to its layer.
        let link = LinkOptions { gbps: None, latency_us: 300.0 };
        let engine = engine(&TINY, DeviceOptions { pipeline, link, order: Some(order.clone()), ..options(1) });
        let sessions = || {
            [0, 70].map(|from| {
                let mut session = engine.session(kv, 300).unwrap();
                prefill(&engine, &mut session, &tokens[from..from + 150], &mut vec![]).unwrap();
                session
            })
        };
        let (mut together, mut buffers) = ([vec![], vec![]], Buffers::default());
        let mut alone = together.clone();
        let mut batches = sessions();
        for at in (0..30).step_by(3) {
            for (session, rows) in batches.iter_mut().zip(&mut together) {
                decode(&engine, &mut [session], &tokens[at..at + 3], &mut buffers, rows).unwrap();
            }
        }
        for (session, rows) in sessions().iter_mut().zip(&mut alone) {
            decode(&engine, &mut [session], &tokens[..30], &mut Buffers::default(), rows).unwrap();
        }
        assert!(together == alone, "{}", pipeline.name());
        assert_eq!(order.lock().unwrap().conflicts(), [], "{}", pipeline.name());
    }
}

/// Buffers may serve one engine after the other: events of one device are never waited for on another.
#[test]
fn buffers_serve_several_engines() {
    let kv = kv(KvMode::SpeCache, 1, 32, 33, 7);
    let engines = [(); 2].map(|()| engine(&TINY, options(1)));
    let tokens = ids(8, 200);
    let mut buffers = Buffers::default();
    let mut sessions = engines.each_ref().map(|engine| {
        let mut session = engine.session(kv, 200).unwrap();
        prefill(engine, &mut session, &tokens[..150], &mut vec![]).unwrap();
        session
    });
    let mut rows = [vec![], vec![]];
    // The first engine's streams are far ahead of the second one's when the buffers change hands.
    decode(&engines[0], &mut [&mut sessions[0]], &tokens[150..170], &mut buffers, &mut rows[0]).unwrap();
    decode(&engines[1], &mut [&mut sessions[1]], &tokens[150..190], &mut buffers, &mut rows[1]).unwrap();
    decode(&engines[0], &mut [&mut sessions[0]], &tokens[170..190], &mut buffers, &mut rows[0]).unwrap();
    assert!(rows[0] == rows[1]);
}
