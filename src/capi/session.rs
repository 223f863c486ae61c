//! Sessions: a sequence, what is known of its next token, and how that is chosen.

use std::ffi::c_char;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use super::chat::Conversation;
use super::engine::{EngineObject, Level, kv_options, tokens};
use super::handles::{self, EngineHandle, SessionHandle};
use super::logits::{Lent, Logits};
use super::memory::{give, set, slice, text};
use super::status::{Fail, Result, Status, guard};
use super::structs::{self, KvOptionsC, SamplingOptionsC};
use crate::kv::KvOptions;
use crate::sampler::{Sampler, SamplingOptions};
use crate::{Buffers, Next, Prompt, Session};

/// What a session handle stands for.
pub struct SessionObject {
    pub(super) engine: Arc<EngineObject>,
    /// Stops the call that runs, or the next one.
    cancel: Arc<AtomicBool>,
    state: Mutex<State>,
}

/// What one call at a time may use.
pub(super) struct State {
    /// `None` while a reset has not found the memory.
    session: Option<Session>,
    kv: KvOptions,
    max_tokens: usize,
    /// The tokens that the session holds.
    pub tokens: Vec<u32>,
    /// The conversation that the first of them are.
    pub conversation: Option<Conversation>,
    /// What follows them, where that is known.
    pub logits: Option<Arc<Logits>>,
    /// The last token that a generation has shown, which is not fed yet.
    pub chosen: Option<u32>,
    pub sampler: Sampler,
}

impl SessionObject {
    fn new(engine: Arc<EngineObject>, session: Session, rest: impl FnOnce(Session) -> State) -> SessionObject {
        let cancel = Arc::<AtomicBool>::default();
        let mut session = session;
        session.stop_when(cancel.clone());
        SessionObject { engine, cancel, state: Mutex::new(rest(session)) }
    }

    /// The session for one call.
    pub(super) fn lock(&self) -> Result<MutexGuard<'_, State>> {
        match self.state.try_lock() {
            Ok(state) => Ok(state),
            Err(TryLockError::WouldBlock) => Err(Fail::new(
                Status::Busy,
                "another call with this session is running; wait for it, or end it with specache_session_cancel",
            )),
            Err(TryLockError::Poisoned(_)) => {
                Err(Fail::internal("an earlier call with this session panicked; free it"))
            }
        }
    }

    /// Heeds a request to cancel, which is over with that.
    pub(super) fn check_cancel(&self) -> Result<()> {
        match self.cancel.load(Ordering::Relaxed) && self.cancel.swap(false, Ordering::Relaxed) {
            true => Err(Fail::cancelled()),
            false => Ok(()),
        }
    }

    /// The same for a call that may have been stopped half way.
    pub(super) fn heed<T>(&self, result: crate::Result<T>) -> Result<T> {
        result.map_err(|error| {
            let fail = Fail::from(error);
            if fail.status == Status::Cancelled {
                self.cancel.store(false, Ordering::Relaxed);
            }
            fail
        })
    }

    /// Adds tokens behind what there is.
    pub(super) fn prefill(&self, state: &mut State, ids: &[u32]) -> Result<()> {
        self.check_cancel()?;
        // Before the token in front of them, so that a place is the caller's.
        if !ids.is_empty() {
            self.engine.engine.context().check_tokens(ids)?;
        }
        let mut prompt = Vec::from_iter(state.chosen);
        prompt.extend_from_slice(ids);
        self.feed_prompt(state, &prompt)
    }

    /// The same with just these tokens, which are checked.
    pub(super) fn feed_prompt(&self, state: &mut State, prompt: &[u32]) -> Result<()> {
        let session = state.session()?;
        let run = |buffers: &mut Lent| {
            self.engine.engine.prefill(&mut [Prompt { session, tokens: prompt }], buffers)?.remove(0)
        };
        state.logits = Some(Logits::known(self.heed(self.engine.with_buffers(1, run))?));
        state.fed(prompt);
        state.max_tokens = state.max_tokens.max(state.tokens.len());
        Ok(())
    }

    /// As a new session. A sound one keeps its memory, so that nobody else can take it; one that has failed is
    /// replaced, and the old one goes first, as its memory is what the new one takes.
    pub(super) fn clear(&self, state: &mut State) -> Result<()> {
        match state.sound() {
            Ok(session) => session.clear()?,
            Err(_) => {
                state.session = None;
                state.forget(0);
                let mut made = self.engine.engine.session(state.kv, state.max_tokens)?;
                made.stop_when(self.cancel.clone());
                state.session = Some(made);
            }
        }
        state.forget(0);
        Ok(())
    }

    /// One step; the logits stay in `buffers`.
    pub(super) fn feed(&self, state: &mut State, token: u32, buffers: &mut Buffers) -> Result<()> {
        let session = state.session()?;
        self.heed(self.engine.engine.decode(&mut [Next { session, token }], buffers))?;
        state.stepped(token, 0, buffers)
    }
}

impl State {
    pub fn session(&mut self) -> Result<&mut Session> {
        self.session.as_mut().ok_or_else(|| {
            Fail::usage("this session is without memory since a reset failed: call specache_session_reset again")
        })
    }

    /// The session, if it has not failed.
    pub fn sound(&mut self) -> Result<&mut Session> {
        let session = self.session()?;
        match session.failure() {
            Some(why) => Err(why.into()),
            None => Ok(session),
        }
    }

    pub fn kv(&self) -> &KvOptions {
        &self.kv
    }

    /// These tokens are in the session now.
    pub fn fed(&mut self, ids: &[u32]) {
        self.tokens.extend_from_slice(ids);
        self.chosen = None;
    }

    /// A step has fed this token, as sequence `i`.
    pub fn stepped(&mut self, token: u32, i: usize, buffers: &Buffers) -> Result<()> {
        buffers.check(i)?;
        self.logits = None;
        self.fed(&[token]);
        Ok(())
    }

    /// The tokens that the session holds from now on; what follows them is not known.
    pub fn forget(&mut self, n_tokens: usize) {
        self.tokens.truncate(n_tokens);
        self.logits = None;
        self.chosen = None;
        self.conversation = self.conversation.take().filter(|it| it.n_tokens <= n_tokens);
    }

    fn known_logits(&mut self) -> Result<Arc<Logits>> {
        self.sound()?;
        self.logits.clone().ok_or_else(|| {
            Fail::usage(
                "no logits: they come from a prefill, a step or a generate call that was the last to change the session",
            )
        })
    }
}

/// A sampler with these options, or with the model's.
fn sampler(engine: &EngineObject, options: Option<SamplingOptionsC>) -> Result<Sampler> {
    let options = match options {
        None => SamplingOptions::from_layers(&Default::default(), &engine.engine.model().generation)?,
        Some(o) => SamplingOptions {
            temperature: o.temperature,
            top_k: o.top_k as usize,
            top_p: o.top_p,
            min_p: o.min_p,
            repeat_penalty: o.repeat_penalty,
            seed: o.seed,
        },
    };
    Ok(Sampler::new(options)?)
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_session_create(
    engine: *mut EngineHandle,
    options: *const KvOptionsC,
    max_tokens: u64,
    session: *mut *mut SessionHandle,
) -> i32 {
    guard(|| {
        // SAFETY: the header's contract.
        unsafe { set(session, std::ptr::null_mut(), "session") }?;
        let engine = handles::engine(engine)?;
        // SAFETY: as above.
        let kv = kv_options(&unsafe { structs::read(options) }?)?;
        let max_tokens = tokens(max_tokens);
        let sampler = sampler(&engine, None)?;
        let made = engine.engine.session(kv, max_tokens)?;
        let most = engine.engine.model().config.max_positions;
        if max_tokens > most {
            engine.log(Level::Warn, || {
                format!("a session of {max_tokens} tokens, but the model's max_position_embeddings is {most}")
            });
        }
        engine.log_notices();
        engine.log(Level::Debug, || format!("a session of {max_tokens} tokens, {}", kv.mode.name()));
        let rest = |session| State {
            session: Some(session),
            kv,
            max_tokens,
            tokens: Vec::new(),
            conversation: None,
            logits: None,
            chosen: None,
            sampler,
        };
        // SAFETY: as above.
        unsafe { set(session, handles::add_session(SessionObject::new(engine, made, rest)), "session") }
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn specache_session_free(session: *mut SessionHandle) {
    guard(|| {
        handles::free_session(session);
        Ok(())
    });
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_session_fork(session: *mut SessionHandle, fork: *mut *mut SessionHandle) -> i32 {
    guard(|| {
        // SAFETY: the header's contract.
        unsafe { set(fork, std::ptr::null_mut(), "fork") }?;
        let object = handles::session(session)?;
        let mut state = object.lock()?;
        let made = state.session()?.fork()?;
        let rest = |session| State {
            session: Some(session),
            kv: state.kv,
            max_tokens: state.max_tokens,
            tokens: state.tokens.clone(),
            conversation: state.conversation.clone(),
            logits: state.logits.clone(),
            chosen: state.chosen,
            sampler: state.sampler.clone(),
        };
        // SAFETY: as above.
        unsafe { set(fork, handles::add_session(SessionObject::new(object.engine.clone(), made, rest)), "fork") }
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn specache_session_truncate(session: *mut SessionHandle, n_tokens: u64) -> i32 {
    guard(|| {
        let object = handles::session(session)?;
        let mut state = object.lock()?;
        state.session()?.truncate(tokens(n_tokens))?;
        state.forget(tokens(n_tokens));
        Ok(())
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn specache_session_reset(session: *mut SessionHandle) -> i32 {
    guard(|| {
        let object = handles::session(session)?;
        let mut state = object.lock()?;
        object.clear(&mut state)?;
        state.sampler = Sampler::new(*state.sampler.options())?;
        object.cancel.store(false, Ordering::Relaxed);
        Ok(())
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn specache_session_reserve(session: *mut SessionHandle, max_tokens: u64) -> i32 {
    guard(|| {
        let object = handles::session(session)?;
        let mut state = object.lock()?;
        state.session()?.reserve(tokens(max_tokens))?;
        state.max_tokens = state.session()?.max_tokens();
        Ok(())
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn specache_session_cancel(session: *mut SessionHandle) -> i32 {
    guard(|| {
        handles::session(session)?.cancel.store(true, Ordering::Relaxed);
        Ok(())
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn specache_session_clear_cancel(session: *mut SessionHandle) -> i32 {
    guard(|| {
        handles::session(session)?.cancel.store(false, Ordering::Relaxed);
        Ok(())
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_session_prefill(session: *mut SessionHandle, ids: *const u32, n_ids: usize) -> i32 {
    guard(|| {
        let object = handles::session(session)?;
        // SAFETY: the header's contract.
        let ids = unsafe { slice(ids, n_ids, "ids") }?;
        object.prefill(&mut *object.lock()?, ids)
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_session_prefill_text(
    session: *mut SessionHandle,
    text: *const c_char,
    n_bytes: usize,
    flags: u32,
) -> i32 {
    guard(|| {
        let object = handles::session(session)?;
        // SAFETY: the header's contract.
        let ids = object.engine.encode(unsafe { self::text(text, n_bytes, "text") }?, flags)?;
        object.prefill(&mut *object.lock()?, &ids)
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_sampling_options_init(
    engine: *mut EngineHandle,
    options: *mut SamplingOptionsC,
    struct_size: u32,
) -> i32 {
    guard(|| {
        let sampler = sampler(&*handles::engine(engine)?, None)?;
        let own = sampler.options();
        let filled = SamplingOptionsC {
            temperature: own.temperature,
            top_k: u32::try_from(own.top_k).unwrap_or(0), // more than any vocabulary: all of it
            top_p: own.top_p,
            min_p: own.min_p,
            repeat_penalty: own.repeat_penalty,
            seed: own.seed,
            ..structs::Sized32::defaults()
        };
        // SAFETY: the header's contract.
        unsafe { structs::init(options, &filled, struct_size) }
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_session_set_sampling(
    session: *mut SessionHandle,
    options: *const SamplingOptionsC,
) -> i32 {
    guard(|| {
        let object = handles::session(session)?;
        // SAFETY: the header's contract.
        let options = if options.is_null() { None } else { Some(unsafe { structs::read(options) }?) };
        object.lock()?.sampler = sampler(&object.engine, options)?;
        Ok(())
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_session_step(
    session: *mut SessionHandle,
    token: u32,
    logits: *mut f32,
    n_logits: usize,
) -> i32 {
    guard(|| {
        let object = handles::session(session)?;
        let out = LogitsOut::new(&object, logits, n_logits)?;
        let mut state = object.lock()?;
        object.check_cancel()?;
        let session = state.session()?;
        object.engine.engine.check(&Next { session, token })?;
        state.logits = None; // nobody's any more, so that they are not taken out of the buffers
        object.engine.with_buffers(1, |buffers| {
            object.feed(&mut state, token, buffers)?;
            state.logits = Some(buffers.leave(0));
            // SAFETY: the header's contract.
            unsafe { out.write(0, buffers) }
        })
    })
}

/// Where logits go: nowhere, or room for exactly the vocabulary. A pointer, as callers may give several steps the same.
pub(super) struct LogitsOut(*mut f32);

impl LogitsOut {
    pub fn new(object: &SessionObject, logits: *mut f32, n_logits: usize) -> Result<LogitsOut> {
        let vocab = object.engine.engine.model().config.vocab_size;
        match logits {
            logits if logits.is_null() && n_logits > 0 => {
                Err(Fail::usage(format!("logits is NULL, but n_logits is {n_logits}: pass 0 for no logits")))
            }
            logits if logits.is_null() => Ok(LogitsOut(logits)),
            _ if n_logits != vocab => {
                Err(Fail::usage(format!("n_logits {n_logits}: must be the vocabulary's {vocab}")))
            }
            logits if !logits.is_aligned() => Err(Fail::usage("logits: the pointer is not aligned to 4 bytes")),
            logits => Ok(LogitsOut(logits)),
        }
    }

    /// Writes those of sequence `i`, if they are wanted.
    ///
    /// # Safety
    /// The pointer that it was made from is NULL or has room for the vocabulary.
    pub unsafe fn write(&self, i: usize, buffers: &mut Buffers) -> Result<()> {
        if !self.0.is_null() {
            let logits = buffers.logits(i)?;
            // SAFETY: the caller's promise; Rust's own memory is elsewhere.
            unsafe { std::ptr::copy_nonoverlapping(logits.as_ptr(), self.0, logits.len()) };
        }
        Ok(())
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_session_logits(
    session: *mut SessionHandle,
    logits: *mut f32,
    capacity: usize,
    n: *mut usize,
) -> i32 {
    guard(|| {
        let object = handles::session(session)?;
        let mut state = object.lock()?;
        let known = state.known_logits()?;
        // SAFETY: the header's contract.
        unsafe { give(known.get()?, logits, capacity, n, "logits") }
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_session_sample(session: *mut SessionHandle, token: *mut u32) -> i32 {
    guard(|| {
        // SAFETY: the header's contract.
        unsafe { set(token, u32::MAX, "token") }?;
        let object = handles::session(session)?;
        let mut state = object.lock()?;
        let known = state.known_logits()?;
        let State { sampler, tokens, .. } = &mut *state;
        let chosen = sampler.sample(known.get()?, tokens)?;
        // SAFETY: as above.
        unsafe { set(token, chosen, "token") }
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_session_tokens(
    session: *mut SessionHandle,
    ids: *mut u32,
    capacity: usize,
    n: *mut usize,
) -> i32 {
    guard(|| {
        let object = handles::session(session)?;
        let state = object.lock()?;
        // SAFETY: the header's contract.
        unsafe { give(&state.tokens, ids, capacity, n, "ids") }
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;
    use std::ptr;

    use super::*;
    use crate::capi::*;
    use crate::device::fault::{Fault, Faults};
    use crate::device::{DeviceChoice, DeviceOptions};

    struct Listener {
        alive: *mut SessionHandle,
        errors: usize,
    }

    /// Hears of a bug, and goes on with another session.
    unsafe extern "C" fn listen(user_data: *mut std::ffi::c_void, level: i32, _: *const c_char) {
        // SAFETY: the listener of the test.
        let listener = unsafe { &mut *user_data.cast::<Listener>() };
        if level == Level::Error as i32 {
            listener.errors += 1;
            // SAFETY: NULL is allowed.
            assert_eq!(unsafe { specache_session_step(listener.alive, 4, ptr::null_mut(), 0) }, 0);
        }
    }

    /// An engine whose copy number `index` fails, of a model with a tokenizer.
    fn faulty(index: u32) -> (*mut EngineHandle, Arc<Faults>) {
        let faults = Arc::new(Faults::at(Fault::Copy, index));
        let options = DeviceOptions {
            choice: DeviceChoice::Cpu,
            threads: Some(1),
            faults: Some(faults.clone()),
            ..DeviceOptions::default()
        };
        let model = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/recall"));
        let engine = crate::Engine::load(model.to_str().unwrap(), &options).unwrap();
        let folder = std::env::temp_dir().join(format!("specache-faulty-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::copy(model.join("tokenizer.json"), folder.join("tokenizer.json")).unwrap();
        std::fs::write(folder.join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
        let object = EngineObject::unheard(engine, &folder).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        (handles::add_engine(object), faults)
    }

    fn last_error() -> String {
        // SAFETY: a C string of this thread, which nothing changes meanwhile.
        unsafe { CStr::from_ptr(specache_last_error()) }.to_str().unwrap().to_string()
    }

    fn n_held(session: *mut SessionHandle) -> u64 {
        let mut n = 0;
        let mut stats: SessionStats = structs::Sized32::defaults();
        // SAFETY: values of this function, here and below.
        unsafe {
            assert_eq!(specache_session_tokens(session, ptr::null_mut(), 0, &mut n), 0);
            assert_eq!(specache_session_get_stats(session, &mut stats), 0);
        }
        assert_eq!(stats.n_tokens, n as u64);
        stats.n_tokens
    }

    /// Whatever copy it is that fails: all later calls give the status and the words of the one that met it, until a reset.
    #[test]
    fn a_session_that_has_failed_says_the_same_in_each_call() {
        let ids: Vec<u32> = (5..155).collect();
        let message = ChatMessage { role: c"user".as_ptr(), content: c"Recall kose".as_ptr() };
        let mut failed_steps = 0;
        for index in (0..).step_by(7) {
            let (engine, faults) = faulty(index);
            let mut one = ptr::null_mut();
            // SAFETY: pointers to values of this function, C strings.
            unsafe {
                assert_eq!(specache_session_create(engine, ptr::null(), 300, &mut one), 0);
                let prompt = || specache_session_prefill(one, ids.as_ptr(), ids.len());
                let step = || specache_session_step(one, 4, ptr::null_mut(), 0);
                let mut calls = (0..4).map(|call| (call, if call == 0 { prompt() } else { step() }));
                if let Some((call, status)) = calls.find(|(_, status)| *status != 0) {
                    let why = last_error();
                    assert!(status == Status::Device as i32 && why.contains("fault injection"), "{status}: {why}");
                    failed_steps += u32::from(call > 0);
                    let held = n_held(one);
                    assert_eq!(held, if call == 0 { 0 } else { 149 + call as u64 });
                    let (mut fork, mut token, mut n) = (ptr::null_mut(), 0, 0);
                    let generate = |n| {
                        specache_session_generate(one, n, 0, None, ptr::null_mut(), ptr::null_mut(), ptr::null_mut())
                    };
                    let given = [
                        prompt(),
                        step(),
                        generate(0),
                        generate(3),
                        specache_session_prefill_text(one, c"kose".as_ptr(), 4, 0),
                        specache_session_prefill_chat(one, &message, 1, ptr::null_mut()),
                        specache_session_fork(one, &mut fork),
                        specache_session_truncate(one, 1),
                        specache_session_reserve(one, 1000),
                        specache_session_logits(one, ptr::null_mut(), 0, &mut n),
                        specache_session_sample(one, &mut token),
                    ];
                    assert_eq!(given, [status; 11]);
                    assert_eq!(last_error(), why);
                    assert_eq!(specache_session_prefill_chat(one, &message, 1, ptr::null_mut()), status);
                    assert_eq!(last_error(), why);
                    let mut batch = Step {
                        session: one,
                        logits: ptr::null_mut(),
                        n_logits: 0,
                        token: 4,
                        next: 0,
                        status: 0,
                        reserved: 0,
                    };
                    assert_eq!(specache_step_batch(&mut batch, 1, size_of::<Step>()), status);
                    assert_eq!((batch.status, last_error()), (status, format!("step 0: {why}")));
                    // It can still be looked at, and begin anew.
                    assert_eq!(n_held(one), held);
                    assert_eq!(specache_session_set_sampling(one, ptr::null()), 0);
                    assert_eq!(specache_session_reset(one), 0);
                    assert_eq!((n_held(one), prompt(), step()), (0, 0, 0));
                }
            }
            specache_session_free(one);
            specache_engine_free(engine);
            if !faults.has_struck() {
                break;
            }
        }
        assert!(failed_steps > 0);
    }

    /// A panic within a call kills the sessions of that call, and nothing else.
    #[test]
    fn a_session_whose_call_panicked_is_dead() {
        let (mut engine, mut dead, mut alive) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
        let mut listener = Listener { alive, errors: 0 };
        // SAFETY: pointers to values of this function, C strings.
        unsafe {
            let model = c"synthetic:tiny".as_ptr();
            let mut options: EngineOptions = structs::Sized32::defaults();
            options.device = c"cpu".as_ptr();
            options.log = Some(listen);
            options.log_user_data = (&raw mut listener).cast();
            assert_eq!(specache_engine_create(SPECACHE_ABI_VERSION, model, &options, &mut engine), 0);
            for session in [&mut dead, &mut alive] {
                assert_eq!(specache_session_create(engine, ptr::null(), 300, session), 0);
                assert_eq!(specache_session_prefill(*session, [1, 2, 3].as_ptr(), 3), 0);
            }
        }
        listener.alive = alive;
        let status = guard(|| {
            let object = handles::session(dead)?;
            let _state = object.lock()?;
            object.engine.with_buffers(1, |_| panic!("something is wrong"))
        });
        assert_eq!((status, listener.errors), (Status::Internal as i32, 1));
        // SAFETY: as above.
        unsafe {
            let step = |session| specache_session_step(session, 4, ptr::null_mut(), 0);
            assert_eq!((step(dead), step(alive)), (Status::Internal as i32, 0));
            assert_eq!(specache_session_reset(dead), Status::Internal as i32);
            assert!(CStr::from_ptr(specache_last_error()).to_str().unwrap().contains("free it"));
            assert_eq!(specache_session_cancel(dead), 0);
            specache_session_free(dead);
            specache_session_free(alive);
            let mut memory: Memory = structs::Sized32::defaults();
            assert_eq!(specache_engine_memory(engine, &mut memory), 0);
            assert_eq!((memory.host_pages_leased, memory.host_pages_reserved), (0, 0));
        }
        specache_engine_free(engine);
    }
}
