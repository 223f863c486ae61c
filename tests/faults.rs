//! Faults in the memory and the copies of a cache: the request that meets one hears of it in words, the slab balances, and
//! the next request gets the right bits.

mod common;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use common::tiny::{Tiny, ids};
use common::{kv, options};
use specache::device::fault::{Fault, Faults};
use specache::device::pin::{Mlock, Pin};
use specache::device::{Device, DeviceOptions, Schedule};
use specache::kv::{KvMode, KvOptions};
use specache::{Buffers, Engine, Error, Next, Prompt, Result, Session};

const TINY: Tiny = Tiny { head_dim: 32, n_kv_heads: 2, group_heads: 3, n_layers: 2, window: None };

fn engine(options: DeviceOptions) -> Engine {
    Engine::new(TINY.model(), Device::cpu(&options).unwrap()).unwrap()
}

/// Makes a call again for as long as it is interrupted.
fn persist<T>(engine: &Engine, mut call: impl FnMut() -> Result<T>) -> Result<T> {
    loop {
        match call() {
            Err(Error::Interrupted) => engine.interrupt_flag().store(false, Ordering::Relaxed),
            outcome => return outcome,
        }
    }
}

fn prefill(engine: &Engine, session: &mut Session, tokens: &[u32]) -> Result<Vec<f32>> {
    let mut call = || engine.prefill(&mut [Prompt { session: &mut *session, tokens }], &mut Buffers::default());
    persist(engine, &mut call)?.remove(0)
}

fn step(engine: &Engine, session: &mut Session, token: u32, buffers: &mut Buffers) -> Result<Vec<f32>> {
    persist(engine, || engine.decode(&mut [Next { session: &mut *session, token }], buffers))?;
    buffers.logits(0).map(<[f32]>::to_vec)
}

/// A session with all that takes pages or copies: prompts, steps over a page border, a fork, a truncation.
fn life(engine: &Engine, kv: KvOptions) -> Result<Vec<Vec<f32>>> {
    let tokens = ids(7, 260);
    let mut session = engine.session(kv, 180)?;
    let mut buffers = Buffers::default();
    let mut rows = vec![prefill(engine, &mut session, &tokens[..157])?];
    for &token in &tokens[157..164] {
        rows.push(step(engine, &mut session, token, &mut buffers)?);
    }
    let mut fork = session.fork()?;
    rows.push(prefill(engine, &mut session, &tokens[164..230])?);
    rows.push(step(engine, &mut fork, 9, &mut buffers)?);
    session.truncate(140)?;
    session.reserve(300)?;
    for &token in &tokens[230..233] {
        rows.push(step(engine, &mut session, token, &mut buffers)?);
    }
    Ok(rows)
}

/// Nothing is held any more, and the slab's equations hold.
fn assert_balanced(engine: &Engine, what: &str) {
    let pages = engine.host_pages();
    assert_eq!((pages.leased, pages.reserved), (0, 0), "{what}");
    assert_eq!(engine.device().device_memory().used(), 0, "{what}");
}

/// Fails each operation of a kind in turn, until a life passes without meeting the fault.
fn sweep(kind: Fault, mode: KvMode, pipeline: Schedule) -> u32 {
    let kv = kv(mode, 1, 32, 33, 7);
    let sound = life(&engine(DeviceOptions { pipeline, ..options(1) }), kv).unwrap();
    for index in 0.. {
        let faults = Arc::new(Faults::at(kind, index));
        let engine = engine(DeviceOptions { pipeline, faults: Some(faults.clone()), ..options(1) });
        let what = format!("{kind:?} number {index}, {}, {}", mode.name(), pipeline.name());
        let outcome = life(&engine, kv);
        assert_balanced(&engine, &what);
        match outcome {
            Err(Error::OutOfMemory { needed, .. }) if kind == Fault::Lease => {
                assert!(needed > 0, "{what}")
            }
            Err(Error::Device(why)) if kind == Fault::Copy => assert!(why.contains("fault injection"), "{what}: {why}"),
            Err(Error::Device(why)) if kind == Fault::Worker => assert!(why.contains("panicked"), "{what}: {why}"),
            // The last copies of a life are for steps that it does not take.
            Ok(rows) => assert!(rows == sound, "{what}: other bits"),
            Err(other) => panic!("{what}: {other}"),
        }
        if !faults.has_struck() {
            return index;
        }
        assert!(life(&engine, kv).unwrap() == sound, "{what}: the next request");
        assert_balanced(&engine, &what);
    }
    unreachable!()
}

#[test]
fn each_lease_may_fail() {
    for mode in [KvMode::Offload, KvMode::Fetch, KvMode::SpeCache] {
        // Session, second prompt, truncation of what a fork shares, more room. The fork needs no page that is not shared.
        assert_eq!(sweep(Fault::Lease, mode, Schedule::Event), 4);
    }
}

#[test]
fn each_copy_may_fail() {
    for mode in [KvMode::Offload, KvMode::Fetch, KvMode::SpeCache] {
        assert!(sweep(Fault::Copy, mode, Schedule::Event) > 25);
    }
    sweep(Fault::Copy, KvMode::SpeCache, Schedule::Stream);
}

#[test]
fn each_copy_thread_may_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let expected = panic.payload_as_str().is_some_and(|what| what.contains("fault injection"));
        if !expected {
            eprintln!("{panic}");
        }
    }));
    for mode in [KvMode::Offload, KvMode::Fetch, KvMode::SpeCache] {
        assert!(sweep(Fault::Worker, mode, Schedule::Event) > 25);
    }
}

/// The system refuses memory that was granted, at each buffer in turn: whatever was refused is as before, can be asked
/// for again or left, and everything goes on with the same bits.
#[test]
fn each_buffer_may_be_refused() {
    /// Makes a call again if it is refused for want of memory.
    fn insist<T>(mut call: impl FnMut() -> Result<T>) -> T {
        match call() {
            Err(Error::OutOfMemory { needed, available, .. }) => {
                assert!(needed > available);
                call().unwrap()
            }
            outcome => outcome.unwrap(),
        }
    }
    let tokens = ids(7, 400);
    for mode in KvMode::ALL {
        let kv = kv(mode, 1, 32, 33, 70);
        let run = |engine: &Engine| {
            let mut session = insist(|| engine.session(kv, 110));
            let mut rows = vec![insist(|| prefill(engine, &mut session, &tokens[..105]))];
            let mut buffers = Buffers::default();
            rows.push(insist(|| step(engine, &mut session, 3, &mut buffers)));
            // Room that is not asked for again: some layers may have grown.
            let grown = session.reserve(250).is_ok();
            let mut fork = insist(|| session.fork());
            for session in [&mut session, &mut fork] {
                rows.push(insist(|| step(engine, session, 4, &mut buffers)));
            }
            // Two prompts at once, of which the second may be refused.
            let both = insist(|| {
                let prompts = [&mut session, &mut fork].map(|session| Prompt { session, tokens: &tokens[110..300] });
                engine.prefill(&mut { prompts }, &mut Buffers::default())
            });
            rows.extend(both.into_iter().map(Result::unwrap));
            for session in [&mut session, &mut fork] {
                insist(|| session.reserve(320));
                rows.push(insist(|| step(engine, session, 5, &mut buffers)));
            }
            (rows, grown)
        };
        let (sound, grown) = run(&engine(options(1)));
        assert!(grown);
        let mut refused = 0;
        for index in 0.. {
            let faults = Arc::new(Faults::at(Fault::Buffer, index));
            let engine = engine(DeviceOptions { faults: Some(faults.clone()), ..options(1) });
            let (rows, grown) = run(&engine);
            refused += u32::from(!grown);
            assert!(rows == sound, "{mode:?}, buffer {index}");
            assert_balanced(&engine, "after a refusal");
            if !faults.has_struck() {
                break;
            }
        }
        assert!(refused > 0, "{mode:?}: growing takes buffers");
    }
}

/// A copy that fails fails the sequences that it was for; others in the batch go on.
#[test]
fn others_in_the_batch_go_on() {
    let (specache, full) = (kv(KvMode::SpeCache, 1, 32, 33, 7), kv(KvMode::Full, 1, 32, 33, 7));
    let tokens = ids(5, 160);
    let run = |index: u32| {
        let faults = Arc::new(Faults::at(Fault::Copy, index));
        let engine = engine(DeviceOptions { faults: Some(faults.clone()), ..options(1) });
        let mut sessions = [specache, full].map(|kv| engine.session(kv, 200).unwrap());
        for session in &mut sessions {
            prefill(&engine, session, &tokens[..150]).unwrap();
        }
        // Copies of all streams are counted: those of the prompt come first.
        while index != u32::MAX && faults.left() > 0 {
            std::thread::yield_now();
        }
        let mut buffers = Buffers::default();
        let mut rows = [vec![], vec![]];
        for &token in &tokens[150..153] {
            if rows[0].last().is_some_and(Result::is_err) {
                let [_, sound] = &mut sessions;
                rows[1].push(step(&engine, sound, token, &mut buffers));
                continue;
            }
            engine.decode(&mut sessions.each_mut().map(|session| Next { session, token }), &mut buffers).unwrap();
            (0..2).for_each(|i| rows[i].push(buffers.logits(i).map(<[f32]>::to_vec)));
        }
        let after = engine.decode(&mut [Next { session: &mut sessions[0], token: 1 }], &mut buffers);
        (rows, after)
    };
    let (sound, _) = run(u32::MAX);
    // Two page-outs of the prompt, then the pre-decode's fetches.
    let (rows, after) = run(2);
    let [bad, good] = rows;
    assert!(matches!(&bad[0], Err(Error::Device(why)) if why.contains("fault injection")), "{:?}", bad[0]);
    assert!(good.iter().zip(&sound[1]).all(|(a, b)| a.as_ref().unwrap() == b.as_ref().unwrap()));
    assert_eq!(after.unwrap_err().to_string(), bad[0].as_ref().unwrap_err().to_string());
}

/// A page-out of one sequence that fails is no other one's business, though their pairs come in one fetch.
#[test]
fn a_page_out_that_fails_fails_its_sequence_alone() {
    let kv = kv(KvMode::SpeCache, 1, 32, 33, 400);
    let tokens = ids(5, 160);
    let run = |index: u32| {
        let faults = Arc::new(Faults::at(Fault::Copy, index));
        let engine = engine(DeviceOptions { faults: Some(faults.clone()), ..options(1) });
        let mut sessions = [(); 2].map(|()| engine.session(kv, 200).unwrap());
        let mut prompts = sessions.each_mut().map(|session| Prompt { session, tokens: &tokens[..150] });
        let first = engine.prefill(&mut prompts, &mut Buffers::default()).unwrap();
        // Copies of all streams are counted: the next ones are fetches.
        while index != u32::MAX && !faults.has_struck() {
            std::thread::yield_now();
        }
        let mut buffers = Buffers::default();
        let mut rows = vec![];
        if first.iter().all(Result::is_ok) {
            engine.decode(&mut sessions.each_mut().map(|session| Next { session, token: 5 }), &mut buffers).unwrap();
            rows = [0, 1].map(|i| buffers.logits(i).map(<[f32]>::to_vec)).into();
        }
        rows.push(step(&engine, &mut sessions[1], 6, &mut buffers));
        (first, rows, sessions[0].fork().err())
    };
    let (_, sound, _) = run(u32::MAX);
    // The first session's last page-out: known when its prefill ends, or in the next step.
    let (first, rows, fork) = run(2);
    assert!(first[1].is_ok());
    let fork = fork.unwrap();
    assert!(fork.to_string().contains("copied to the host"), "{fork}");
    if first[0].is_ok() {
        assert!(matches!(&rows[0], Err(Error::Device(why)) if why.contains("copied to the host")), "{:?}", rows[0]);
        assert!(rows[1].as_ref().unwrap() == sound[1].as_ref().unwrap());
        assert!(rows[2].as_ref().unwrap() == sound[2].as_ref().unwrap());
    }
}

/// Pins as long as it is told to.
struct Limited {
    left: AtomicI64,
    pinned: AtomicI64,
}

impl Pin for Limited {
    fn pin(&self, _: NonNull<u8>, bytes: usize) -> std::result::Result<(), String> {
        if self.left.fetch_sub(1, Ordering::Relaxed) <= 0 {
            return Err(format!("no more than that, said the test, of {bytes} bytes"));
        }
        self.pinned.fetch_add(bytes as i64, Ordering::Relaxed);
        Ok(())
    }

    fn unpin(&self, _: NonNull<u8>, bytes: usize) {
        self.pinned.fetch_sub(bytes as i64, Ordering::Relaxed);
    }
}

/// Memory that cannot be pinned is used as it is: the figures say so, the bits are the same, and what was pinned is unpinned.
#[test]
fn each_pin_may_fail() {
    let kv = kv(KvMode::SpeCache, 1, 32, 33, 7);
    let sound = life(&engine(options(1)), kv).unwrap();
    for left in 0..4 {
        let pin = Arc::new(Limited { left: AtomicI64::new(left), pinned: AtomicI64::new(0) });
        let engine = engine(DeviceOptions { pin: Some(pin.clone()), ..options(1) });
        assert!(life(&engine, kv).unwrap() == sound, "{left} pins");
        assert_balanced(&engine, "after a life");
        let arenas = engine.host_pages().arenas;
        let (prepared, pinned) = arenas.iter().fold((0, 0), |s, a| (s.0 + a.prepared_bytes, s.1 + a.pinned_bytes));
        if left == 0 {
            assert_eq!(pinned, 0);
            let why = arenas[0].not_pinned.as_deref().unwrap();
            assert!(why.contains("said the test"), "{why}");
        }
        assert!(pinned <= prepared);
        drop(engine);
        // A thread that was touching memory in the background may hold it a moment longer.
        let end = Instant::now() + Duration::from_secs(20);
        while pin.pinned.load(Ordering::Relaxed) != 0 {
            assert!(Instant::now() < end, "{left} pins: not unpinned");
            std::thread::yield_now();
        }
    }
}

/// Pins for a device that cannot use pageable memory; they fail while the flag is set.
struct Required(AtomicBool);

impl Pin for Required {
    fn pin(&self, _: NonNull<u8>, _: usize) -> Result<(), String> {
        if self.0.load(Ordering::Relaxed) { Err("no more of that, said the test".into()) } else { Ok(()) }
    }

    fn is_required(&self) -> bool {
        true
    }

    fn unpin(&self, _: NonNull<u8>, _: usize) {}
}

/// Where pages must be pinned, a request that needs them is refused whole while they cannot be, and served afterwards.
#[test]
fn pages_that_must_be_pinned() {
    let kv = kv(KvMode::SpeCache, 1, 32, 33, 7);
    let sound = life(&engine(options(1)), kv).unwrap();
    let pin = Arc::new(Required(AtomicBool::new(true)));
    let engine = engine(DeviceOptions { pin: Some(pin.clone()), ..options(1) });
    for _ in 0..2 {
        let refused = engine.session(kv, 300).err().unwrap();
        assert!(refused.exit_code() == 5 && refused.to_string().contains("said the test"), "{refused}");
        assert_balanced(&engine, "after a refusal");
    }
    pin.0.store(false, Ordering::Relaxed);
    assert!(life(&engine, kv).unwrap() == sound);
    assert_balanced(&engine, "after a life");
}

/// `mlock` beyond RLIMIT_MEMLOCK: needs a process of its own, as limits are for ever.
#[test]
fn a_small_memlock_limit_is_named_with_its_knob() {
    const CHILD: &str = "SPECACHE_TEST_MEMLOCK_CHILD";
    if std::env::var_os(CHILD).is_none() {
        let test = "a_small_memlock_limit_is_named_with_its_knob";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let output = child.args([test, "--exact", "--nocapture"]).env(CHILD, "1").output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{out}{err}");
        if !out.contains("skipped") {
            for part in [
                "stay pageable",
                "bytes was refused",
                "RLIMIT_MEMLOCK is 65536 bytes",
                "8192 bytes are locked already (VmLck)",
                "57344 bytes are available",
                "ulimit -l unlimited",
            ] {
                assert!(err.contains(part), "{part}: {err}");
            }
            // The first chunk of an arena, or the second, which another thread touches meanwhile.
            assert!(["mlock of 2097152", "mlock of 4194304"].iter().any(|chunk| err.contains(chunk)), "{err}");
        }
        return;
    }
    use nix::sys::resource::{Resource, setrlimit};
    setrlimit(Resource::RLIMIT_MEMLOCK, 64 << 10, 64 << 10).unwrap();
    drop_ipc_lock();
    // Two pages are locked already, which a message that only knew of the limit would not count.
    let held = [0u8; 3 * 4096];
    let locked = Mlock.pin(NonNull::from(&held[held.as_ptr().align_offset(4096)]), 8192);
    let kv = kv(KvMode::SpeCache, 1, 32, 33, 7);
    let engine = engine(DeviceOptions { pin: Some(Arc::new(Mlock)), ..options(1) });
    let sound = life(&self::engine(options(1)), kv).unwrap();
    assert!(life(&engine, kv).unwrap() == sound);
    let arenas = engine.host_pages().arenas;
    if arenas.iter().any(|arena| arena.pinned_bytes > 0) {
        println!("skipped: this process may lock memory whatever its limit");
    }
    if let Err(why) = locked {
        println!("skipped: this process may lock nothing: {why}");
    }
}

/// Root may lock without limit: gives that right up, where this process has it.
fn drop_ipc_lock() {
    // Another user has no capabilities; nobody's number is 65534 everywhere.
    let _ = nix::unistd::setuid(nix::unistd::Uid::from_raw(65534));
}

/// Interrupted at each layer of each pass and at each chunk of each prompt in turn, and called again: the same bits as
/// if nothing had happened.
#[test]
fn each_interruption_leaves_the_bits() {
    for mode in [KvMode::Offload, KvMode::Fetch, KvMode::SpeCache] {
        for pipeline in Schedule::ALL {
            for delta in [true, false] {
                let kv = kv(mode, 1, 32, 33, 7);
                let options = DeviceOptions { pipeline, delta, ..options(1) };
                let sound = life(&engine(options.clone()), kv).unwrap();
                let mut index = 0;
                loop {
                    let faults = Arc::new(Faults::at(Fault::Interrupt, index));
                    let engine = engine(DeviceOptions { faults: Some(faults.clone()), ..options.clone() });
                    let what = format!("{} {} delta {delta}, interruption {index}", mode.name(), pipeline.name());
                    assert!(life(&engine, kv).unwrap() == sound, "{what}");
                    assert_balanced(&engine, &what);
                    if !faults.has_struck() {
                        break;
                    }
                    index += 1;
                }
                // 2 prompts and 11 steps of 2 layers each; pre-decodes where there are any.
                assert!(index >= 26, "{index} interruptions");
            }
        }
    }
}

/// What a batch of all modes gives, with the figures that do not depend on time: prompts, steps, prompts behind them,
/// steps over a page's end.
fn batch_life(engine: &Engine) -> (Vec<Vec<f32>>, Vec<String>) {
    let tokens = ids(11, 400);
    let mut sessions = KvMode::ALL.map(|mode| engine.session(kv(mode, 1, 32, 33, 7), 300).unwrap());
    sessions.iter_mut().for_each(Session::keep_trace);
    let (mut rows, mut buffers, mut fed) = (vec![], Buffers::default(), 0);
    for (prompt, steps) in [(150, 3), (70, 4)] {
        let tokens = |i: usize, from: usize, n: usize| &tokens[7 * i + from..7 * i + from + n];
        let first = persist(engine, || {
            let prompts = sessions.iter_mut().enumerate();
            let mut prompts: Vec<_> =
                prompts.map(|(i, session)| Prompt { session, tokens: tokens(i, fed, prompt) }).collect();
            engine.prefill(&mut prompts, &mut buffers)
        });
        rows.extend(first.unwrap().into_iter().map(Result::unwrap));
        fed += prompt;
        for _ in 0..steps {
            let step = persist(engine, || {
                let batch = sessions.iter_mut().enumerate();
                let mut batch: Vec<_> =
                    batch.map(|(i, session)| Next { session, token: tokens(i, fed, 1)[0] }).collect();
                engine.decode(&mut batch, &mut buffers)
            });
            step.unwrap();
            rows.extend((0..sessions.len()).map(|i| buffers.logits(i).unwrap().to_vec()));
            fed += 1;
        }
    }
    let figures = sessions.iter().map(|session| {
        let stats = session.stats();
        // What `fetch` has fetched lies in its slots when the step is taken again.
        let fetched = (session.kv().mode == KvMode::SpeCache).then_some((&stats.fetched, stats.fetched_bytes));
        let counts = (stats.steps, stats.accepted, stats.compared, stats.offloaded_bytes);
        format!("{counts:?} {:?} {fetched:?} {:?}", stats.hits, session.trace())
    });
    (rows, figures.collect())
}

/// As above, for all modes in one batch, with their figures and traces.
#[test]
fn each_interruption_leaves_a_batch_and_its_figures() {
    for pipeline in Schedule::ALL {
        let options = DeviceOptions { pipeline, ..options(1) };
        let sound = batch_life(&engine(options.clone()));
        let mut index = 0;
        loop {
            let faults = Arc::new(Faults::at(Fault::Interrupt, index));
            let engine = engine(DeviceOptions { faults: Some(faults.clone()), ..options.clone() });
            let (rows, figures) = batch_life(&engine);
            assert!(rows == sound.0, "{}, interruption {index}: other bits", pipeline.name());
            assert_eq!(figures, sound.1, "{}, interruption {index}", pipeline.name());
            assert_balanced(&engine, "after a batch");
            if !faults.has_struck() {
                break;
            }
            index += 1;
        }
        // Two layers: of 5 prompts, of a pre-decode, of 3 and of 4 steps.
        assert_eq!(index, 2 * (5 + 1 + 3 + 5 + 1 + 4));
    }
}

/// An interrupted call that is not made again has changed nothing: whatever comes next has the bits of a session that
/// never heard of it, and no page more or less is held.
#[test]
fn an_interrupted_call_is_as_if_it_had_never_been() {
    // Fresh from a prompt, so that the call begins with a pre-decode; and past the offload of a page, which is not read
    // low-bit yet.
    for (mode, steps) in KvMode::ALL.into_iter().flat_map(|mode| [(mode, 0), (mode, 21)]) {
        let (kv, tokens) = (kv(mode, 1, 32, 33, 7), ids(9, 400));
        let before = |engine: &Engine| {
            let mut session = engine.session(kv, 350).unwrap();
            prefill(engine, &mut session, &tokens[..140]).unwrap();
            for &token in &tokens[140..140 + steps] {
                step(engine, &mut session, token, &mut Buffers::default()).unwrap();
            }
            session
        };
        let after = |engine: &Engine, session: &mut Session| {
            let mut fork = session.fork().unwrap();
            let mut buffers = Buffers::default();
            let mut rows = vec![];
            for &token in &tokens[200..203] {
                rows.push(step(engine, session, token, &mut buffers).unwrap());
            }
            rows.push(prefill(engine, &mut fork, &tokens[300..400]).unwrap());
            rows.push(step(engine, &mut fork, 3, &mut buffers).unwrap());
            rows
        };
        let sound = engine(options(1));
        let expected = after(&sound, &mut before(&sound));
        let mut interrupted = [0, 0];
        for prompt in [false, true] {
            for index in 0.. {
                let faults = Arc::new(Faults::at(Fault::Interrupt, index));
                let engine = engine(DeviceOptions { faults: Some(faults.clone()), ..options(1) });
                let mut session = before(&engine);
                let held = |session: &Session| {
                    let pages = engine.host_pages();
                    let stats = session.stats();
                    let bytes = (stats.offloaded_bytes, stats.fetched_bytes, stats.pre_decode_bytes);
                    (session.cache_bytes(), pages.leased + pages.reserved, bytes, session.n_tokens())
                };
                let held_before = held(&session);
                let outcome = if prompt {
                    let call = Prompt { session: &mut session, tokens: &tokens[140 + steps..330] };
                    engine.prefill(&mut [call], &mut Buffers::default()).map(drop)
                } else {
                    engine.decode(&mut [Next { session: &mut session, token: 5 }], &mut Buffers::default())
                };
                if !faults.has_struck() {
                    break;
                }
                if let Err(error) = outcome {
                    assert!(matches!(error, Error::Interrupted), "{error}");
                    interrupted[usize::from(prompt)] += 1;
                    engine.interrupt_flag().store(false, Ordering::Relaxed);
                    assert_eq!(held(&session), held_before, "{mode:?} after {steps} steps, interruption {index}");
                    assert!(
                        after(&engine, &mut session) == expected,
                        "{mode:?} after {steps} steps, interruption {index}"
                    );
                }
            }
        }
        let passes = if mode == KvMode::SpeCache && steps == 0 { 2 } else { 1 };
        assert_eq!(interrupted, [passes * TINY.n_layers, TINY.n_layers], "{mode:?} after {steps} steps");
    }
}

/// Cancelled while it decodes, from another thread, whenever that comes: it goes on with the same bits as if nothing
/// had happened.
#[test]
fn cancelled_while_decoding_and_gone_on_with() {
    let kv = kv(KvMode::SpeCache, 1, 32, 33, 7);
    let engine = engine(options(1));
    let tokens = ids(3, 600);
    let run = |cancel: bool| {
        let mut session = engine.session(kv, 600).unwrap();
        let mut buffers = Buffers::default();
        let mut rows = vec![prefill(&engine, &mut session, &tokens[..150]).unwrap()];
        let flag = engine.interrupt_flag();
        flag.store(cancel, Ordering::Relaxed); // once at least
        let canceller = cancel.then(|| {
            std::thread::spawn(move || {
                for _ in 0..20 {
                    std::thread::sleep(Duration::from_micros(700));
                    flag.store(true, Ordering::Relaxed);
                }
            })
        });
        let mut cancelled = 0;
        for &token in &tokens[150..599] {
            loop {
                match engine.decode(&mut [Next { session: &mut session, token }], &mut buffers) {
                    Ok(()) => break rows.push(buffers.logits(0).unwrap().to_vec()),
                    Err(Error::Interrupted) => {
                        cancelled += 1;
                        engine.interrupt_flag().store(false, Ordering::Relaxed);
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        }
        canceller.into_iter().for_each(|thread| thread.join().unwrap());
        engine.interrupt_flag().store(false, Ordering::Relaxed);
        (rows, cancelled)
    };
    let (sound, _) = run(false);
    let (rows, cancelled) = run(true);
    assert!(cancelled > 0);
    assert!(rows == sound);
    assert_balanced(&engine, "after both");
}

/// A budget below one sequence is refused before it starts, with the bytes needed and available and the option to change.
#[test]
fn a_budget_below_one_sequence_is_named() {
    let kv = kv(KvMode::SpeCache, 1, 32, 33, 7);
    let engine = engine(DeviceOptions { host_budget: Some(100_000), ..options(1) });
    let error = engine.session(kv, 2000).err().unwrap();
    assert_eq!(error.exit_code(), 4);
    let text = error.to_string();
    // 30 pages of 16 KiB in each of 2 layers.
    for part in ["host memory", "983040 bytes", "--host-kv-budget", "are available"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_balanced(&engine, "after a refusal");
}

/// A process that may use one core has one thread of each kind, and works.
#[test]
fn one_core_is_enough() {
    let kv = kv(KvMode::SpeCache, 1, 32, 33, 7);
    let sound = life(&engine(options(2)), kv).unwrap();
    let confined = std::thread::spawn(move || {
        use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
        let me = nix::unistd::Pid::from_raw(0);
        let allowed = sched_getaffinity(me).unwrap();
        let mut one = CpuSet::new();
        one.set((0..CpuSet::count()).find(|&cpu| allowed.is_set(cpu).unwrap()).unwrap()).unwrap();
        sched_setaffinity(me, &one).unwrap();
        let engine = engine(DeviceOptions { poison: true, ..DeviceOptions::default() });
        assert_eq!(engine.device().threads(), 1);
        let gather = engine.device().copy_engine();
        assert_eq!(gather.gather.threads(), 1);
        assert!(gather.gather.describe().contains("1 NUMA node (node 0: 1 CPUs)"), "{}", gather.gather.describe());
        life(&engine, kv).unwrap()
    });
    assert!(confined.join().unwrap() == sound);
}
