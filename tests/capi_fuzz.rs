//! Random calls of the C interface with good, bad and stale arguments, while another thread cancels, looks on, and now and then
//! frees a session. A model of what each session holds is compared after every call: a call that fails has changed nothing. At
//! times a session's logits are compared, bit for bit, with those of a lone session that was given the same tokens.
//!
//! Three seconds; `SPECACHE_FUZZ_SECONDS=600` for longer. `SPECACHE_FUZZ_SEED` repeats a run that failed.
#![allow(unsafe_code)] // Calls of C functions.

mod common;

use std::collections::HashSet;
use std::ffi::{CString, c_char, c_void};
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::capi::*;
use common::tiny::Random;

const VOCAB: usize = 1536;
/// Small enough that sessions are refused now and then.
const HOST_BUDGET: u64 = 6 << 20;
const DEVICE_BUDGET: u64 = 16 << 20;
/// Most tokens of a generation: the time is for many calls and not for long ones.
const MOST_GENERATED: u64 = 100;

/// How tokens came into a session, or left it.
#[derive(Clone)]
enum Deed {
    Prefill(Vec<u32>),
    Step(u32),
    Truncate(usize),
}

/// What a session should hold.
#[derive(Clone)]
struct Model {
    tokens: Vec<u32>,
    /// Generated, and not fed.
    chosen: Option<u32>,
    handle: Handle<SessionHandle>,
    kv: KvOptionsC,
    deeds: Vec<Deed>,
}

impl Model {
    fn prefilled(&mut self, ids: Vec<u32>) {
        self.tokens.extend(&ids);
        self.chosen = None;
        self.deeds.push(Deed::Prefill(ids));
    }

    fn stepped(&mut self, token: u32) {
        self.tokens.push(token);
        self.chosen = None;
        self.deeds.push(Deed::Step(token));
    }

    fn truncated(&mut self, n: usize) {
        self.tokens.truncate(n);
        self.chosen = None;
        self.deeds.push(Deed::Truncate(n));
        if n == 0 {
            self.deeds.clear();
        }
    }
}

/// What both threads know.
#[derive(Default)]
struct Shared {
    /// Where the other thread finds handles.
    shown: Vec<Handle<SessionHandle>>,
    /// What it has freed.
    freed: HashSet<usize>,
}

struct Fuzzer {
    random: Random,
    engine: EnginePtr,
    stale_engine: EnginePtr,
    /// Where lone sessions are.
    lone_engine: EnginePtr,
    sessions: Vec<Model>,
    stale: Vec<SessionPtr>,
    shared: Arc<Mutex<Shared>>,
    text: Vec<u8>,
    trace: CString,
    compared: u64,
    calls: [u64; 12],
}

impl Fuzzer {
    fn below(&mut self, n: u64) -> u64 {
        self.random.bits() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// Any session's place, mostly a living one's; `None` for a handle that is wrong.
    fn pick(&mut self) -> (Option<usize>, SessionPtr) {
        if self.sessions.is_empty() || self.one_in(20) {
            let wrong = match self.below(4) {
                0 => ptr::null_mut(),
                1 => self.engine.cast(),
                2 => self.random.bits() as SessionPtr,
                _ => self.stale.last().copied().unwrap_or(ptr::null_mut()),
            };
            return (None, wrong);
        }
        let i = self.below(self.sessions.len() as u64) as usize;
        (Some(i), self.sessions[i].handle.get())
    }

    fn pick_engine(&mut self) -> EnginePtr {
        if self.one_in(20) { self.stale_engine } else { self.engine }
    }

    /// Ids, most of them of the vocabulary, and how many are said to be there.
    fn ids(&mut self) -> Vec<u32> {
        let n = if self.one_in(10) { self.below(300) } else { self.below(40) };
        let bad = self.one_in(20);
        (0..n).map(|_| self.below(if bad { 2 * VOCAB as u64 } else { VOCAB as u64 }) as u32).collect()
    }

    /// A number that is small, or anything.
    fn number(&mut self, most: u64) -> u64 {
        if self.one_in(15) { self.random.bits() >> self.below(64) } else { self.below(most) }
    }

    fn kv(&mut self) -> KvOptionsC {
        let mut kv = KvOptionsC { mode: self.below(5) as i32, top_k: self.below(80) as u32, ..kv_options() };
        kv.bits = [1, 2, 4][self.below(3) as usize];
        kv.group_size = [32, 64][self.below(2) as usize];
        kv.residual_len = 32 + self.below(100) as u32;
        match self.below(25) {
            0 => kv.struct_size = self.number(40) as u32,
            1 => kv.mode = self.number(9) as i32 - 2,
            2 => kv.bits = self.number(9) as u32,
            3 => kv.group_size = self.number(100) as u32,
            4 => kv.residual_len = self.number(1 << 20) as u32,
            5 => kv.top_k = self.number(1 << 20) as u32,
            6 => kv.dtype = self.number(6) as i32,
            _ => {}
        }
        kv
    }

    /// Notes a call; a bug inside is never an answer, and every failure has words.
    fn note(&mut self, status: i32) -> bool {
        let count = self.calls.get_mut(status as usize).expect("a known status");
        *count += 1;
        assert_ne!(status, Status::Internal as i32, "{}", last_error());
        assert!(status == 0 || !last_error().is_empty());
        status == 0
    }

    fn call(&mut self) {
        match self.below(29) {
            0 | 1 if self.sessions.len() < 6 => self.create(),
            0..3 => self.free(),
            3..6 => self.prefill(),
            6..10 => self.step(),
            10..13 => self.generate(),
            13 => self.fork(),
            14 => self.truncate(),
            15 => self.reset(),
            16 => self.reserve(),
            17 => self.sample(),
            18..21 => self.batch(),
            21 => self.sampling(),
            22 => self.text(),
            23 => self.look(),
            24 => self.cancel(),
            25 | 26 => self.chat(),
            27 => self.facts(),
            _ => self.engines(),
        }
        self.check();
        self.shared.lock().unwrap().shown = self.sessions.iter().map(|s| s.handle).collect();
        if self.one_in(150) {
            self.compare();
        }
    }

    /// What was done to a session gives a lone one the same logits.
    fn compare(&mut self) {
        let (Some(i), handle) = self.pick() else { return };
        let Model { kv, deeds, tokens: held, .. } = self.sessions[i].clone();
        let (mut row, mut n) = (vec![0.0f32; VOCAB], 0);
        // SAFETY: room for the vocabulary.
        if unsafe { specache_session_logits(handle, row.as_mut_ptr(), VOCAB, &mut n) } != 0 {
            return; // there are none, or somebody else is at it
        }
        let lone = session(self.lone_engine, &kv, 1);
        ok(specache_session_reserve(lone, held.len() as u64 + 1));
        for deed in &deeds {
            ok(match deed {
                Deed::Prefill(ids) => prefill(lone, ids),
                Deed::Step(token) => {
                    ok(specache_session_reserve(lone, tokens(lone).len() as u64 + 1));
                    step(lone, *token)
                }
                Deed::Truncate(n) => specache_session_truncate(lone, *n as u64),
            });
        }
        assert_eq!(tokens(lone), held);
        assert!(logits(lone) == row, "mode {} after {} deeds", kv.mode, deeds.len());
        specache_session_free(lone);
        self.compared += 1;
    }

    /// All sessions hold what the model says.
    fn check(&mut self) {
        for i in (0..self.sessions.len()).rev() {
            let model = &self.sessions[i];
            let (mut ids, mut n) = (vec![0; model.tokens.len()], 0);
            let status = loop {
                // SAFETY: room for as many as it says.
                let status =
                    unsafe { specache_session_tokens(model.handle.get(), ids.as_mut_ptr(), ids.len(), &mut n) };
                if status != Status::Busy as i32 {
                    break status;
                }
                thread::yield_now();
            };
            if status == Status::Handle as i32 {
                assert!(self.shared.lock().unwrap().freed.contains(&(model.handle.get() as usize)));
                self.stale.push(self.sessions.remove(i).handle.get());
                continue;
            }
            assert_eq!((status, n, &ids), (0, model.tokens.len(), &model.tokens), "{}", last_error());
        }
    }

    fn create(&mut self) {
        let (engine, kv, max_tokens) = (self.pick_engine(), self.kv(), self.number(900));
        let mut handle = ptr::null_mut();
        // SAFETY: values of this function.
        let status = unsafe { specache_session_create(engine, &kv, max_tokens, &mut handle) };
        if self.note(status) {
            // What an older struct lacks has its default.
            let kv = if kv.struct_size == 28 { kv } else { read_back(kv) };
            self.sessions.push(Model { tokens: vec![], chosen: None, handle: Handle(handle), kv, deeds: vec![] });
        } else {
            assert!(handle.is_null());
        }
    }

    fn free(&mut self) {
        let (place, handle) = self.pick();
        specache_session_free(handle);
        if let Some(i) = place {
            self.sessions.remove(i);
            self.stale.push(handle);
        }
    }

    fn prefill(&mut self) {
        let (place, handle) = self.pick();
        let ids = self.ids();
        let status = match self.one_in(30) {
            // SAFETY: NULL is refused.
            true => unsafe { specache_session_prefill(handle, ptr::null(), ids.len()) },
            false => prefill(handle, &ids),
        };
        if let (true, Some(i)) = (self.note(status), place) {
            let model = &mut self.sessions[i];
            let ids = model.chosen.into_iter().chain(ids).collect();
            model.prefilled(ids);
        }
    }

    fn step(&mut self) {
        let (place, handle) = self.pick();
        let token = self.number(VOCAB as u64) as u32;
        let n = if self.one_in(20) { self.below(2000) as usize } else { VOCAB };
        let mut logits = vec![f32::NAN; VOCAB];
        let to = if self.one_in(2) { logits.as_mut_ptr() } else { ptr::null_mut() };
        let n = if to.is_null() && !self.one_in(20) { 0 } else { n };
        // SAFETY: any other length than that of the vocabulary is refused.
        let status = unsafe { specache_session_step(handle, token, to, n) };
        if let (true, Some(i)) = (self.note(status), place) {
            self.sessions[i].stepped(token);
            assert!(to.is_null() || logits.iter().all(|x| x.is_finite()));
        }
    }

    fn generate(&mut self) {
        let (place, handle) = self.pick();
        let n = self.number(12).min(MOST_GENERATED);
        let flags = if self.one_in(20) { self.random.bits() as u32 } else { self.below(4) as u32 };
        let most = if self.one_in(4) { Some(self.below(5) as usize) } else { None };
        let (status, shown, stop) = generate(handle, n, flags, most);
        self.note(status);
        assert!(status != 0 || (0..3).contains(&stop));
        if let (Some(i), Some((&last, fed))) = (place, shown.ids.split_last()) {
            let model = &mut self.sessions[i];
            model.chosen.into_iter().chain(fed.iter().copied()).for_each(|token| model.stepped(token));
            model.chosen = Some(last);
        }
    }

    fn fork(&mut self) {
        let (place, handle) = self.pick();
        let mut fork = ptr::null_mut();
        // SAFETY: a pointer of this function.
        let status = unsafe { specache_session_fork(handle, &mut fork) };
        if let (true, Some(i)) = (self.note(status), place) {
            let model = Model { handle: Handle(fork), ..self.sessions[i].clone() };
            self.sessions.push(model);
        }
    }

    fn truncate(&mut self) {
        let (place, handle) = self.pick();
        let n = self.number(300);
        if let (true, Some(i)) = (self.note(specache_session_truncate(handle, n)), place) {
            self.sessions[i].truncated(n as usize);
        }
    }

    fn reset(&mut self) {
        let (place, handle) = self.pick();
        let status = specache_session_reset(handle);
        self.note(status);
        if let (Some(i), true) = (place, status == 0) {
            self.sessions[i].truncated(0);
        }
    }

    fn reserve(&mut self) {
        let (_, handle) = self.pick();
        let n = self.number(1200);
        let status = specache_session_reserve(handle, n);
        self.note(status);
    }

    fn sample(&mut self) {
        let (_, handle) = self.pick();
        let mut token = 0;
        // SAFETY: a number of this function.
        let status = unsafe { specache_session_sample(handle, &mut token) };
        assert!(!self.note(status) || (token as usize) < VOCAB);
    }

    fn batch(&mut self) {
        let n = self.below(5) as usize;
        let picked: Vec<_> = (0..n).map(|_| self.pick()).collect();
        let mut steps: Vec<Step> = picked
            .iter()
            .map(|&(_, session)| {
                let token = self.number(VOCAB as u64) as u32;
                Step { session, logits: ptr::null_mut(), n_logits: 0, token, next: 0, status: 9, reserved: 0 }
            })
            .collect();
        let size = if self.one_in(30) { self.below(100) as usize } else { size_of::<Step>() };
        // SAFETY: as many steps as there are; another size of them is refused.
        let status = unsafe { specache_step_batch(steps.as_mut_ptr(), steps.len(), size) };
        self.note(status);
        for (step, (place, _)) in steps.iter().zip(picked) {
            assert!((0..11).contains(&step.status), "{step:?}");
            if let (0, Some(i)) = (step.status, place) {
                self.sessions[i].stepped(step.token);
                assert!((step.next as usize) < VOCAB);
            }
        }
    }

    fn sampling(&mut self) {
        let (_, handle) = self.pick();
        // SAFETY: zero is a value of every field.
        let mut sampling: SamplingOptionsC = unsafe { std::mem::zeroed() };
        // SAFETY: a struct of this function, here and below.
        let status = unsafe { specache_sampling_options_init(self.engine, &mut sampling, 32) };
        assert!(self.note(status));
        sampling.temperature = self.below(3) as f32 / 2.0;
        sampling.top_k = self.below(50) as u32;
        sampling.seed = self.random.bits();
        let any = f32::from_bits(self.random.bits() as u32);
        match self.below(12) {
            0 => sampling.temperature = any,
            1 => sampling.top_p = any,
            2 => sampling.min_p = any,
            3 => sampling.repeat_penalty = any,
            4 => sampling.struct_size = self.number(40) as u32,
            _ => {}
        }
        // SAFETY: as above; a size that is larger than the struct is refused.
        let status = unsafe { specache_session_set_sampling(handle, &sampling) };
        self.note(status);
    }

    fn text(&mut self) {
        let engine = self.pick_engine();
        let at = self.below(self.text.len() as u64 - 60) as usize;
        let mut bytes = self.text[at..at + self.random.bits() as usize % 60].to_vec();
        if self.one_in(3) && !bytes.is_empty() {
            let i = self.below(bytes.len() as u64) as usize;
            bytes[i] = self.random.bits() as u8;
        }
        let (mut ids, mut n) = (vec![0u32; self.below(60) as usize], 0);
        let flags = self.number(2) as u32;
        // SAFETY: slices with their lengths.
        let status = unsafe {
            let text = bytes.as_ptr().cast::<c_char>();
            specache_tokenize(engine, text, bytes.len(), flags, ids.as_mut_ptr(), ids.len(), &mut n)
        };
        if self.note(status) {
            assert!(n <= ids.len());
        }
        let some = self.ids();
        let mut out = vec![0 as c_char; self.below(200) as usize];
        // SAFETY: as above.
        let status =
            unsafe { specache_detokenize(engine, some.as_ptr(), some.len(), out.as_mut_ptr(), out.len(), &mut n) };
        if self.note(status) {
            assert!(n < out.len() || (n == 0 && out.is_empty()) || out.is_empty());
        }
    }

    fn look(&mut self) {
        let (place, handle) = self.pick();
        // SAFETY: zero is a value of every field.
        let mut stats: SessionStats = unsafe { std::mem::zeroed() };
        stats.struct_size = if self.one_in(3) { self.below(200) as u32 } else { size_of::<SessionStats>() as u32 };
        // SAFETY: a size that is larger than the struct is refused.
        let status = unsafe { specache_session_get_stats(handle, &mut stats) };
        if let (true, Some(i)) = (self.note(status), place) {
            let whole = stats.struct_size >= 16;
            assert!(!whole || stats.n_tokens as usize == self.sessions[i].tokens.len());
        }
        let (mut layers, mut n) = ([LayerStats::default(); 8], 0);
        let capacity = self.below(9) as usize;
        // SAFETY: room for as many as it says.
        let status = unsafe { specache_session_layer_stats(handle, layers.as_mut_ptr(), capacity, &mut n) };
        self.note(status);
        let (mut logits, mut n) = (vec![0.0; VOCAB], 0);
        let capacity = self.below(VOCAB as u64 + 1) as usize;
        // SAFETY: as above.
        let status = unsafe { specache_session_logits(handle, logits.as_mut_ptr(), capacity, &mut n) };
        self.note(status);
    }

    fn cancel(&mut self) {
        let (_, handle) = self.pick();
        let status =
            if self.one_in(2) { specache_session_cancel(handle) } else { specache_session_clear_cancel(handle) };
        self.note(status);
    }

    /// A conversation, in one session of many or as text.
    fn chat(&mut self) {
        let (engine, (place, handle)) = (self.pick_engine(), self.pick());
        let n = self.below(5) as usize;
        let words = ["Recall kose", "The password of kose zesi rere bago", "zesi", "", "h\u{e9}"];
        let contents: Vec<CString> = (0..n).map(|_| CString::new(words[self.below(5) as usize]).unwrap()).collect();
        let bad = self.one_in(20);
        let roles = [c"user", c"assistant", if bad { c"\xff" } else { c"user" }];
        let messages: Vec<ChatMessage> = contents
            .iter()
            .enumerate()
            .map(|(i, content)| ChatMessage { role: roles[i % 3].as_ptr(), content: content.as_ptr() })
            .collect();
        let (mut text, mut length) = (vec![0 as c_char; self.below(200) as usize], 0);
        let add = self.below(2) as i32;
        // SAFETY: messages and buffers of this function, with their lengths.
        let status = unsafe {
            specache_chat_prompt(engine, messages.as_ptr(), n, add, text.as_mut_ptr(), text.len(), &mut length)
        };
        self.note(status);
        let mut kept = 0;
        // SAFETY: as above.
        let status = unsafe { specache_session_prefill_chat(handle, messages.as_ptr(), n, &mut kept) };
        let good = self.note(status);
        let Some(i) = place else { return };
        let Some(held) = self.held(i) else { return };
        let model = &mut self.sessions[i];
        // A failure may have left the common beginning alone.
        let kept = if good { kept as usize } else { held.len() };
        assert_eq!(held[..kept], model.tokens[..kept]);
        if kept < model.tokens.len() {
            model.truncated(kept);
        }
        if good {
            model.prefilled(held[kept..].to_vec());
        }
    }

    /// The tokens of a session, once nobody else looks at them; `None` if somebody has freed it.
    fn held(&self, i: usize) -> Option<Vec<u32>> {
        let (mut ids, mut n) = (vec![0; 4000], 0);
        loop {
            let handle = self.sessions[i].handle.get();
            // SAFETY: room for as many as it says.
            match unsafe { specache_session_tokens(handle, ids.as_mut_ptr(), ids.len(), &mut n) } {
                0 => break,
                status if status == Status::Handle as i32 => return None,
                status => assert_eq!(status, Status::Busy as i32, "{}", last_error()),
            }
        }
        ids.truncate(n);
        Some(ids)
    }

    /// What an engine says of itself, and its trace.
    fn facts(&mut self) {
        let engine = self.pick_engine();
        // SAFETY: zero is a value of every field.
        let mut info: ModelInfo = unsafe { std::mem::zeroed() };
        info.struct_size = self.number(60) as u32;
        let (mut ids, mut text, mut n) = ([0u32; 2], [0 as c_char; 100], 0);
        let room = self.below(101) as usize;
        let path = [self.trace.as_ptr(), c"/no/such/folder/x".as_ptr(), ptr::null()][self.below(3) as usize];
        // SAFETY: buffers of this function with their lengths; a size that is larger than the struct is refused.
        let statuses = unsafe {
            [
                specache_engine_model_info(engine, &mut info),
                specache_engine_eos_tokens(engine, ids.as_mut_ptr(), room % 3, &mut n),
                specache_engine_describe(engine, text.as_mut_ptr(), room, &mut n),
                specache_engine_trace(engine, room as i32 % 2),
                specache_engine_trace_write(engine, path),
                specache_engine_measure_waits(engine, room as i32 % 2),
            ]
        };
        for status in statuses {
            self.note(status);
        }
    }

    /// Engines that are not, plans, and what an engine says of itself.
    fn engines(&mut self) {
        let version = if self.one_in(3) { self.random.bits() as u32 } else { SPECACHE_ABI_VERSION };
        let mut options = EngineOptions { struct_size: self.number(80) as u32, ..engine_options() };
        options.threads = 1;
        let mut engine = ptr::null_mut();
        let model = [c"synthetic:tiny", c"synthetic:none", c"/dev/null", c"", c"\xff"][self.below(5) as usize];
        // SAFETY: C strings and structs of this function; a size that is larger than the struct is refused.
        let status = unsafe { specache_engine_create(version, model.as_ptr(), &options, &mut engine) };
        self.note(status);
        specache_engine_free(engine);
        let kv = self.kv();
        // SAFETY: zero is a value of every field.
        let mut plan: MemoryPlan = unsafe { std::mem::zeroed() };
        plan.struct_size = size_of::<MemoryPlan>() as u32;
        let max_tokens = self.number(1 << 20);
        // SAFETY: as above.
        let status = unsafe { specache_plan(version, model.as_ptr(), &kv, max_tokens, &mut plan) };
        self.note(status);
        memory(self.engine);
    }
}

/// Somebody else, who cancels what runs and looks at what he should not.
fn meddle(shared: &Mutex<Shared>, end: &AtomicBool, seed: u64) {
    let mut random = Random(seed);
    while !end.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_micros(random.bits() % 3000));
        let handle = {
            let mut shared = shared.lock().unwrap();
            let i = random.bits() as usize % shared.shown.len().max(1);
            let handle = shared.shown.get(i).map_or(ptr::null_mut(), |handle| handle.get());
            if random.bits().is_multiple_of(64) && !handle.is_null() {
                shared.freed.insert(handle as usize);
                drop(shared);
                specache_session_free(handle);
            }
            handle
        };
        let mut n = 0;
        // SAFETY: values of this function, or NULL.
        let status = unsafe {
            match random.bits() % 4 {
                0 => specache_session_cancel(handle),
                1 => specache_session_clear_cancel(handle),
                2 => specache_session_tokens(handle, ptr::null_mut(), 0, &mut n),
                _ => specache_session_get_stats(handle, ptr::null_mut::<c_void>().cast()),
            }
        };
        assert_ne!(status, Status::Internal as i32, "{}", last_error());
    }
}

/// The recall model with a chat template.
fn folder() -> PathBuf {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi-fuzz");
    std::fs::create_dir_all(&folder).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(common::fixture("recall").join(file), folder.join(file)).unwrap();
    }
    let template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}. {% endif %}{% endfor %}";
    std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    folder
}

/// Options of this struct, which may be an older one, as the library reads them.
fn read_back(kv: KvOptionsC) -> KvOptionsC {
    let mut whole = kv_options();
    // SAFETY: both are of that struct, of which the size says how much counts.
    unsafe { ptr::copy_nonoverlapping((&raw const kv).cast::<u8>(), (&raw mut whole).cast(), kv.struct_size as usize) };
    KvOptionsC { struct_size: size_of::<KvOptionsC>() as u32, ..whole }
}

fn run(seed: u64, end: Instant, folder: &std::path::Path) -> ([u64; 12], u64) {
    let budgets = EngineOptions { host_kv_budget: HOST_BUDGET, device_budget: DEVICE_BUDGET, ..engine_options() };
    let engine = engine(folder, &EngineOptions { trace: 1, ..budgets });
    let trace = folder.join("trace.json");
    let stale_engine = common::capi::engine("synthetic:tiny".as_ref(), &engine_options());
    specache_engine_free(stale_engine);
    let text = std::fs::read(common::fixture("recall_prompt.txt")).unwrap();
    let mut fuzzer = Fuzzer {
        random: Random(seed),
        engine,
        stale_engine,
        lone_engine: recall(),
        sessions: vec![],
        stale: vec![],
        shared: Arc::default(),
        text,
        trace: CString::new(trace.to_str().unwrap()).unwrap(),
        compared: 0,
        calls: [0; 12],
    };
    let (shared, over) = (fuzzer.shared.clone(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| meddle(&shared, &over, seed ^ 1));
        let calls = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            (0..4000).take_while(|_| Instant::now() < end).for_each(|_| fuzzer.call())
        }));
        over.store(true, Ordering::Relaxed);
        if let Err(panic) = calls {
            eprintln!("SPECACHE_FUZZ_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    });
    for model in fuzzer.sessions.drain(..) {
        specache_session_free(model.handle.get());
    }
    let memory = memory(engine);
    assert_eq!((memory.host_pages_leased, memory.host_pages_reserved, memory.device_kv_bytes), (0, 0, 0), "{seed}");
    specache_engine_free(engine);
    specache_engine_free(fuzzer.lone_engine);
    (fuzzer.calls, fuzzer.compared)
}

#[test]
fn random_calls() {
    let number = |name: &str| std::env::var(name).ok().map(|s| s.parse::<u64>().expect("a number"));
    let seconds = number("SPECACHE_FUZZ_SECONDS").unwrap_or(3);
    let end = Instant::now() + Duration::from_secs(seconds);
    let first = number("SPECACHE_FUZZ_SEED").unwrap_or(1);
    let (mut calls, mut compared, folder) = ([0; 12], 0, folder());
    for seed in first.. {
        let (counts, same) = run(seed, end, &folder);
        compared += same;
        calls.iter_mut().zip(counts).for_each(|(sum, n)| *sum += n);
        if Instant::now() >= end {
            break;
        }
    }
    let all: u64 = calls.iter().sum();
    println!("{all} calls; by status, from 0 on: {calls:?}; {compared} sessions compared with lone ones");
    assert!(calls[0] > 100, "most calls are good ones");
}
