//! Calls of the C interface, for tests of it: the functions themselves, with errors in words.
#![allow(unsafe_code)] // Calls of C functions.

use std::ffi::{CStr, CString, c_void};
use std::path::Path;
use std::ptr;

pub use specache::capi::*;

pub type EnginePtr = *mut EngineHandle;
pub type SessionPtr = *mut SessionHandle;

/// Text of this thread's last failure.
pub fn last_error() -> String {
    // SAFETY: a C string of this thread, which no other call changes meanwhile.
    unsafe { CStr::from_ptr(specache_last_error()) }.to_str().unwrap().to_string()
}

/// The call has succeeded.
#[track_caller]
pub fn ok(status: i32) {
    assert_eq!(status, 0, "{}", last_error());
}

/// The call has failed in this way, with these words.
#[track_caller]
pub fn fails(status: i32, expected: Status, words: &str) {
    let text = last_error();
    assert_eq!(status, expected as i32, "{text}");
    assert!(text.contains(words), "{text:?} does not have {words:?}");
}

/// A handle that may go to other threads.
#[derive(Debug)]
pub struct Handle<T>(pub *mut T);

impl<T> Clone for Handle<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Handle<T> {}

impl<T> Handle<T> {
    pub fn get(self) -> *mut T {
        self.0
    }
}

// SAFETY: handles are names, which are never dereferenced.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Handle<T> {}

/// The defaults, on the CPU whatever this machine has.
pub fn engine_options() -> EngineOptions {
    // SAFETY: zero and NULL are values of every field.
    let mut options: EngineOptions = unsafe { std::mem::zeroed() };
    // SAFETY: a struct of this function.
    ok(unsafe { specache_engine_options_init(&mut options, size_of::<EngineOptions>() as u32) });
    options.device = c"cpu".as_ptr();
    options
}

pub fn kv_options() -> KvOptionsC {
    // SAFETY: zero is a value of every field.
    let mut options: KvOptionsC = unsafe { std::mem::zeroed() };
    // SAFETY: a struct of this function.
    ok(unsafe { specache_kv_options_init(&mut options, size_of::<KvOptionsC>() as u32) });
    options
}

pub fn engine(model: &Path, options: &EngineOptions) -> EnginePtr {
    let (model, mut engine) = (CString::new(model.to_str().unwrap()).unwrap(), ptr::null_mut());
    // SAFETY: a C string and structs of this function.
    ok(unsafe { specache_engine_create(SPECACHE_ABI_VERSION, model.as_ptr(), options, &mut engine) });
    engine
}

pub fn recall() -> EnginePtr {
    engine(&super::fixture("recall"), &engine_options())
}

pub fn session(engine: EnginePtr, options: &KvOptionsC, max_tokens: u64) -> SessionPtr {
    let mut session = ptr::null_mut();
    // SAFETY: a struct of the caller, a pointer of this function.
    ok(unsafe { specache_session_create(engine, options, max_tokens, &mut session) });
    session
}

pub fn prefill(session: SessionPtr, ids: &[u32]) -> i32 {
    // SAFETY: a slice.
    unsafe { specache_session_prefill(session, ids.as_ptr(), ids.len()) }
}

pub fn step(session: SessionPtr, token: u32) -> i32 {
    // SAFETY: NULL is allowed.
    unsafe { specache_session_step(session, token, ptr::null_mut(), 0) }
}

/// A list that the library returns, asked for its length first.
pub fn list<T: Clone>(zero: T, get: impl Fn(*mut T, usize, *mut usize) -> i32) -> Vec<T> {
    let mut n = 0;
    ok(get(ptr::null_mut(), 0, &mut n));
    let mut values = vec![zero; n + 1]; // a text is followed by a NUL
    ok(get(values.as_mut_ptr(), values.len(), &mut n));
    values.truncate(n);
    values
}

pub fn tokens(session: SessionPtr) -> Vec<u32> {
    // SAFETY: `list` passes room for as many as it says.
    list(0, |ids, capacity, n| unsafe { specache_session_tokens(session, ids, capacity, n) })
}

pub fn logits(session: SessionPtr) -> Vec<f32> {
    // SAFETY: as above.
    list(0.0, |logits, capacity, n| unsafe { specache_session_logits(session, logits, capacity, n) })
}

pub fn tokenize(engine: EnginePtr, text: &str) -> Vec<u32> {
    let data = text.as_ptr().cast();
    // SAFETY: as above, and the text's own length.
    list(0, |ids, capacity, n| unsafe { specache_tokenize(engine, data, text.len(), 0, ids, capacity, n) })
}

/// A step of a batch, without logits.
pub fn batched(session: SessionPtr, token: u32) -> Step {
    Step { session, logits: ptr::null_mut(), n_logits: 0, token, next: 0, status: -1, reserved: 0 }
}

/// A batched step, as they are.
pub fn step_batch(steps: &mut [Step]) -> i32 {
    // SAFETY: as many steps as there are, each with room for its logits.
    unsafe { specache_step_batch(steps.as_mut_ptr(), steps.len(), size_of::<Step>()) }
}

/// What a session's sampling options choose.
pub fn sample(session: SessionPtr) -> u32 {
    let mut token = 0;
    // SAFETY: a number of this function.
    ok(unsafe { specache_session_sample(session, &mut token) });
    token
}

pub fn memory(engine: EnginePtr) -> Memory {
    // SAFETY: zero is a value of every field.
    let mut memory: Memory = unsafe { std::mem::zeroed() };
    memory.struct_size = size_of::<Memory>() as u32;
    // SAFETY: a struct of this function.
    ok(unsafe { specache_engine_memory(engine, &mut memory) });
    memory
}

pub fn stats(session: SessionPtr) -> SessionStats {
    // SAFETY: zero is a value of every field.
    let mut stats: SessionStats = unsafe { std::mem::zeroed() };
    stats.struct_size = size_of::<SessionStats>() as u32;
    // SAFETY: a struct of this function.
    ok(unsafe { specache_session_get_stats(session, &mut stats) });
    stats
}

/// What a generation has shown.
#[derive(Debug, Default)]
pub struct Shown {
    pub ids: Vec<u32>,
    pub text: String,
    pub eos: Vec<bool>,
    /// Stop after so many tokens.
    pub most: Option<usize>,
}

/// `specache_token_fn` for a [`Shown`].
///
/// # Safety
/// `user_data` is a `Shown` that nobody else uses.
pub unsafe extern "C" fn show(user_data: *mut c_void, token: *const TokenC) -> i32 {
    // SAFETY: the caller's promise, and the library's.
    let (shown, token) = unsafe { (&mut *user_data.cast::<Shown>(), &*token) };
    // SAFETY: as above.
    let text = unsafe { std::slice::from_raw_parts(token.text.cast::<u8>(), token.n_bytes as usize + 1) };
    assert_eq!((token.struct_size as usize, text.last()), (size_of::<TokenC>(), Some(&0)));
    shown.text.push_str(std::str::from_utf8(&text[..text.len() - 1]).expect("whole characters"));
    if token.id != u32::MAX {
        assert_eq!(token.index as usize, shown.ids.len());
        shown.ids.push(token.id);
        shown.eos.push(token.is_eos == 1);
    }
    if shown.most == Some(shown.ids.len()) { 7 } else { 0 }
}

/// Generates, and returns the status, what was shown and why it ended.
pub fn generate(session: SessionPtr, n: u64, flags: u32, most: Option<usize>) -> (i32, Shown, i32) {
    let (mut shown, mut generated, mut stop) = (Shown { most, ..Shown::default() }, 0, -1);
    let user_data = (&raw mut shown).cast();
    // SAFETY: values of this function.
    let status =
        unsafe { specache_session_generate(session, n, flags, Some(show), user_data, &mut generated, &mut stop) };
    assert_eq!(generated as usize, shown.ids.len());
    (status, shown, stop)
}
