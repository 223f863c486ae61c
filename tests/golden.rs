//! The engine against the golden case: the recall model, teacher forced, computed by an independent implementation.

mod common;

use common::{Distance, fixture, json, kv, npy, recall, run};
use specache::kv::{KvMode, KvOptions};
use std::sync::LazyLock;

/// The golden case's prompt: the first 300 of its 400 ids.
const PREFILL: usize = 300;

static ENGINE: LazyLock<specache::Engine> = LazyLock::new(recall);
static IDS: LazyLock<Vec<u32>> = LazyLock::new(|| json(fixture("golden/ids.json")));

/// Bounds as for the reference (tests/reference_golden.rs, where the figures behind them stand): single logits move by
/// 1e-2 where a K or V lies between two bf16 numbers and the order of a sum decides, the median row hardly at all.
fn check(name: &str, options: KvOptions, speculative: Option<&[u32]>) -> specache::Session {
    let (rows, session) = run(&ENGINE, options, &IDS, PREFILL, speculative);
    let golden = npy(fixture(&format!("golden/{name}.logits.npy")));
    let d = Distance::between(&rows, &golden);
    println!("{name}: {d:?}");
    assert!(d.max < 5e-2, "{name}: {d:?}");
    assert!(d.median < 5e-4, "{name}: {d:?}");
    assert!(d.first_row < 1e-4, "{name}: {d:?}");
    // `kivi` at 1 bit is 3e-2 away from `full`, at 2 bits 5e-4.
    assert!(d.mean_kld < 1e-6, "{name}: {d:?}");
    session
}

#[test]
fn full() {
    check("full", kv(KvMode::Full, 2, 64, 64, 64), None);
}

#[test]
fn offload_is_full() {
    let (full, _) = run(&ENGINE, kv(KvMode::Full, 2, 64, 64, 64), &IDS, PREFILL, None);
    let (offload, session) = run(&ENGINE, kv(KvMode::Offload, 2, 64, 64, 64), &IDS, PREFILL, None);
    assert_eq!(full, offload, "the same pairs in the same order: the same bits");
    // 192 tokens are offloaded at first, a page more at steps 28 and 92 (n - no >= R + P).
    let per_step = session.stats().fetched_bytes_per_step().unwrap();
    let pair_bytes = 4.0 * 2.0 * 256.0; // layers x KV heads x K and V of 64 bf16
    assert!((192.0 * pair_bytes..320.0 * pair_bytes).contains(&per_step), "{per_step}");
}

#[test]
fn kivi_1_bit() {
    check("kivi-b1-g64-R64", kv(KvMode::Kivi, 1, 64, 64, 0), None);
}

#[test]
fn kivi_2_bit() {
    check("kivi-b2-g32-R100", kv(KvMode::Kivi, 2, 32, 100, 0), None);
}

fn check_specache(name: &str, options: KvOptions) {
    let speculative: Vec<u32> = json(fixture(&format!("golden/{name}.spec.json")));
    let session = check(name, options, Some(&speculative));
    let golden: serde_json::Value = json(fixture(&format!("golden/{name}.selections.json")));
    let trace = session.trace().unwrap();
    let ours = std::iter::once(&trace.pre_decode).chain(&trace.steps);
    let theirs = std::iter::once(&golden["pre_decode"]).chain(golden["steps"].as_array().unwrap());
    let (mut sets, mut other, mut positions) = (0, 0, 0);
    for (ours, theirs) in ours.zip(theirs) {
        let theirs: specache::session::Selections = serde_json::from_value(theirs.clone()).unwrap();
        for (ours, theirs) in ours.iter().flatten().zip(theirs.iter().flatten()) {
            assert_eq!(ours.len(), theirs.len());
            let missing = theirs.iter().filter(|p| ours.binary_search(p).is_err()).count();
            (sets, other, positions) = (sets + 1, other + usize::from(missing > 0), positions + missing);
        }
    }
    println!("{name}: {other} of {sets} selections differ, by {positions} positions");
    assert_eq!(sets, 100 * 4 * 2);
    // Near ties fall either way: the reference differs in 4 of 800 sets, by one position each.
    assert!(other * 100 <= sets && positions <= 2 * other, "{other} of {sets} selections, {positions} positions");

    // The model's own guesses are the golden ones too.
    let (_, own) = run(&ENGINE, options, &IDS, PREFILL, None);
    assert_eq!(own.trace().unwrap().speculative, speculative);
    let rate = own.stats().hit_rate().unwrap();
    assert!((0.2..1.0).contains(&rate), "hit rate {rate}");
}

#[test]
fn specache_1_bit() {
    check_specache("specache-b1-g64-R64-k16", kv(KvMode::SpeCache, 1, 64, 64, 16));
}

#[test]
fn specache_2_bit() {
    check_specache("specache-b2-g32-R100-k64", kv(KvMode::SpeCache, 2, 32, 100, 64));
}
