//! 16 threads that create, use, cancel, fork and free sessions of one engine, their own and each other's. Whatever happens
//! around it, a session's greedy tokens are those of a lone run; at the end the slab balances.
//!
//! Three seconds; `SPECACHE_STRESS_SECONDS=60` for longer.
#![allow(unsafe_code)] // Calls of C functions.

mod common;

use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::capi::*;
use common::tiny::Random;

const THREADS: u64 = 16;
/// Tokens of a session after its prompt.
const GENERATED: u64 = 40;

/// A prompt with options, and what follows it.
struct Case {
    kv: KvOptionsC,
    prompt: Vec<u32>,
    expected: Vec<u32>,
}

fn cases(engine: EnginePtr) -> Vec<Case> {
    let text = std::fs::read_to_string(common::fixture("recall_prompt.txt")).unwrap();
    let ids = tokenize(engine, &text);
    let case = |i: usize| {
        let kv = KvOptionsC { mode: (i % 5) as i32, bits: 1, top_k: 16, ..kv_options() };
        let prompt = ids[i * 20..i * 20 + 130 + 31 * i].to_vec();
        let session = session(engine, &kv, 600);
        ok(prefill(session, &prompt));
        let (status, shown, _) = generate(session, GENERATED, 1, None);
        ok(status);
        specache_session_free(session);
        Case { kv, prompt, expected: shown.ids }
    };
    (0..10).map(case).collect()
}

/// How often what has happened, over all threads.
#[derive(Default)]
struct Counts {
    complete: AtomicU64,
    cancelled: AtomicU64,
    freed: AtomicU64,
    forked: AtomicU64,
}

struct Shared {
    engine: Handle<EngineHandle>,
    cases: Vec<Case>,
    /// Sessions that live, or did until lately: anybody may cancel or free them.
    sessions: Mutex<Vec<Handle<SessionHandle>>>,
    counts: Counts,
}

impl Shared {
    fn victim(&self, random: &mut Random) -> SessionPtr {
        let sessions = self.sessions.lock().unwrap();
        let i = random.bits() as usize % sessions.len().max(1);
        sessions.get(i).map_or(ptr::null_mut(), |session| session.get())
    }

    fn publish(&self, session: SessionPtr) {
        self.sessions.lock().unwrap().push(Handle(session));
    }

    /// What one thread does between two calls of its own.
    fn meddle(&self, random: &mut Random) {
        match random.bits() % 24 {
            0..6 => drop(specache_session_cancel(self.victim(random))),
            6 => {
                specache_session_free(self.victim(random));
                self.counts.freed.fetch_add(1, Ordering::Relaxed);
            }
            7 => assert!([0, Status::Busy as i32, Status::Handle as i32].contains(&step_back(self.victim(random)))),
            _ => {}
        }
    }

    /// The life of one session. Returns when it is complete, or somebody has freed it.
    fn live(&self, random: &mut Random) {
        let case = &self.cases[random.bits() as usize % self.cases.len()];
        let one = session(self.engine.get(), &case.kv, 600);
        self.publish(one);
        let mut given = Vec::new();
        while tokens_of(one).is_some_and(|tokens| tokens.len() < case.prompt.len()) {
            match prefill(one, &case.prompt) {
                0 => {}
                status => self.expect(status),
            }
        }
        while (given.len() as u64) < GENERATED {
            self.meddle(random);
            let n = (1 + random.bits() % 9).min(GENERATED - given.len() as u64);
            let (status, shown, _) = generate(one, n, 1, None);
            given.extend(shown.ids);
            if status == Status::Handle as i32 {
                break;
            }
            self.expect(status);
            if random.bits().is_multiple_of(16) {
                self.fork(one, case, &given, random);
            }
        }
        assert_eq!(given, case.expected[..given.len()], "mode {}", case.kv.mode);
        self.counts.complete.fetch_add((given.len() as u64 == GENERATED).into(), Ordering::Relaxed);
        specache_session_free(one);
        self.sessions.lock().unwrap().retain(|session| session.get() != one);
    }

    /// A fork goes on by itself, in the middle of what its trunk does.
    fn fork(&self, trunk: SessionPtr, case: &Case, given: &[u32], random: &mut Random) {
        let mut fork = ptr::null_mut();
        // SAFETY: a pointer of this function.
        let status = unsafe { specache_session_fork(trunk, &mut fork) };
        if status != 0 {
            return self.expect(status);
        }
        self.counts.forked.fetch_add(1, Ordering::Relaxed);
        let n = (random.bits() % 8).min(GENERATED - given.len() as u64);
        let (status, shown, _) = generate(fork, n, 1, None);
        ok(status);
        assert_eq!(shown.ids, case.expected[given.len()..given.len() + n as usize]);
        specache_session_free(fork);
    }

    /// Somebody else may have cancelled it or looked at it, or it has been freed; nothing else can go wrong.
    fn expect(&self, status: i32) {
        let known = [0, Status::Cancelled as i32, Status::Handle as i32, Status::Busy as i32];
        assert!(known.contains(&status), "{status}: {}", last_error());
        self.counts.cancelled.fetch_add((status == Status::Cancelled as i32).into(), Ordering::Relaxed);
    }
}

/// Looks at a session that may be at work.
fn step_back(session: SessionPtr) -> i32 {
    let mut n = 0;
    // SAFETY: a number of this function.
    unsafe { specache_session_tokens(session, ptr::null_mut(), 0, &mut n) }
}

/// `None` for a session that is gone.
fn tokens_of(session: SessionPtr) -> Option<Vec<u32>> {
    let (mut ids, mut n) = (vec![0; 1000], 0);
    loop {
        // SAFETY: room for as many as it says.
        match unsafe { specache_session_tokens(session, ids.as_mut_ptr(), ids.len(), &mut n) } {
            0 => break,
            status if status == Status::Handle as i32 => return None,
            status => assert_eq!(status, Status::Busy as i32, "{}", last_error()),
        }
    }
    ids.truncate(n);
    Some(ids)
}

#[test]
fn sixteen_threads() {
    let seconds = std::env::var("SPECACHE_STRESS_SECONDS").map_or(3, |s| s.parse().expect("a number of seconds"));
    let engine = recall();
    let shared =
        Shared { engine: Handle(engine), cases: cases(engine), sessions: Mutex::default(), counts: Counts::default() };
    let end = Instant::now() + Duration::from_secs(seconds);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let shared = &shared;
            scope.spawn(move || {
                let mut random = Random(thread + 1);
                while Instant::now() < end {
                    shared.live(&mut random);
                }
            });
        }
    });
    let Counts { complete, cancelled, freed, forked } = &shared.counts;
    let [complete, cancelled, freed, forked] = [complete, cancelled, freed, forked].map(|n| n.load(Ordering::Relaxed));
    println!(
        "{complete} sessions complete, {cancelled} calls cancelled, {freed} sessions freed by others, {forked} forks"
    );
    assert!(complete > 0 && cancelled > 0 && freed > 0, "what is to be tested has happened");
    let memory = memory(engine);
    assert_eq!((memory.host_pages_leased, memory.host_pages_reserved, memory.device_kv_bytes), (0, 0, 0));
    specache_engine_free(engine);
}
