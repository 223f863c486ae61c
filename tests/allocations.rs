//! A decode step allocates nothing once it has warmed up: neither on its thread nor on any other.
#![allow(unsafe_code)] // A global allocator.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::tiny::{Tiny, ids};
use common::{kv, options};
use specache::device::{Device, DeviceOptions, Schedule};
use specache::kv::KvMode;
use specache::{Buffers, Engine, Next, Prompt, Session};

/// The system's allocator, which notes who calls it while it is armed.
struct Watched;

static ARMED: AtomicBool = AtomicBool::new(false);
static RAYON: AtomicU64 = AtomicU64::new(0);
static OURS: Mutex<Vec<String>> = Mutex::new(Vec::new());

thread_local! {
    /// This thread is noting an allocation, which allocates.
    static NOTING: Cell<bool> = const { Cell::new(false) };
}

fn note() {
    if !ARMED.load(Ordering::Relaxed) || NOTING.replace(true) {
        return;
    }
    let trace = Backtrace::force_capture().to_string();
    // Whoever comes first on the way up, of those that matter.
    let frame = trace.lines().find(|line| {
        ["rayon", "crossbeam", "specache::"].iter().any(|name| line.contains(name)) && !line.contains("allocations")
    });
    // Not ours: the test harness, and a thread that was started before (to touch an arena) and only begins to run now.
    let foreign = frame.is_none() && ["test::test_main", "stack_overflow::"].iter().any(|name| trace.contains(name));
    if frame.is_some_and(|line| line.contains("rayon") || line.contains("crossbeam")) {
        RAYON.fetch_add(1, Ordering::Relaxed);
    } else if !foreign {
        OURS.lock().unwrap().push(trace);
    }
    NOTING.set(false);
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: the caller's promise is the same.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

const TINY: Tiny = Tiny { head_dim: 64, n_kv_heads: 2, group_heads: 4, n_layers: 3, window: None };

/// Runs `steps` of a batch and gives what allocated on the way.
fn watch(engine: &Engine, sessions: &mut [Session], tokens: &[u32], buffers: &mut Buffers) -> Vec<String> {
    for &token in tokens {
        // The batch itself is the caller's, and made before.
        let mut batch: Vec<Next> = sessions.iter_mut().map(|session| Next { session, token }).collect();
        ARMED.store(true, Ordering::SeqCst);
        engine.decode(&mut batch, buffers).unwrap();
        ARMED.store(false, Ordering::SeqCst);
    }
    std::mem::take(&mut *OURS.lock().unwrap())
}

/// One test, so that no other allocates meanwhile.
#[test]
fn a_step_allocates_nothing() {
    // The watch sees something at all.
    ARMED.store(true, Ordering::SeqCst);
    let seen = std::hint::black_box(vec![0u8; 4096]);
    ARMED.store(false, Ordering::SeqCst);
    drop(seen);
    assert_eq!(std::mem::take(&mut *OURS.lock().unwrap()).len(), 1);

    let tokens = ids(1, 1300);
    for mode in KvMode::ALL {
        for pipeline in Schedule::ALL {
            for threads in [1, 2] {
                let device = Device::cpu(&DeviceOptions { pipeline, poison: false, ..options(threads) }).unwrap();
                let engine = Engine::new(TINY.model(), device).unwrap();
                let mut buffers = Buffers::default();
                let mut sessions: Vec<Session> = (0..2)
                    .map(|i| {
                        let mut session = engine.session(kv(mode, 2, 64, 64, 16), 1100).unwrap();
                        let prompt = Prompt { session: &mut session, tokens: &tokens[..600 + 31 * i] };
                        engine.prefill(&mut [prompt], &mut buffers).unwrap().remove(0).unwrap();
                        session
                    })
                    .collect();
                // Each thread warms up when work first comes to it, and which thread takes what is rayon's to decide: so each
                // does alone, while the others wait for their turn, all that comes in 64 steps.
                let state = Mutex::new((&mut sessions, &mut buffers));
                engine.device().run(|| {
                    rayon::broadcast(|_| {
                        let (sessions, buffers) = &mut *state.lock().unwrap();
                        watch(&engine, sessions, &tokens[..65], buffers);
                    })
                });
                // The first two rounds may allocate; the last two, each longer than from one page's end to the next, not.
                for round in 0..4 {
                    let tokens = &tokens[650 + round * 80..730 + round * 80];
                    let allocations = watch(&engine, &mut sessions, tokens, &mut buffers);
                    let what = format!("{}, {}, {threads} threads, round {round}", mode.name(), pipeline.name());
                    if let (Some(first), true) = (allocations.first(), round >= 2) {
                        panic!("{what}: {} allocations, the first:\n{first}", allocations.len());
                    }
                }
            }
        }
    }
    println!("rayon's own: {}", RAYON.load(Ordering::Relaxed));
}
