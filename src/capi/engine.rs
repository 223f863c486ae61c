//! Engines: a model on a device, with its tokenizer, its chat template and whoever listens to it.

use std::ffi::{CString, c_char, c_void};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::handles::{self, EngineHandle};
use super::logits::{Lent, Pool};
use super::memory::{c_text, give, give_text, set};
use super::status::{Fail, Result, Status, as_called_here, guard};
use super::structs::{self, EngineOptions, LogFn, Memory, MemoryPlan, ModelInfo};
use super::{KvOptionsC, SPECACHE_ABI_VERSION};
use crate::chat::ChatTemplate;
use crate::device::choice::DeviceChoice;
use crate::device::pin::{Mlock, Pin};
use crate::device::trace::write_chrome;
use crate::device::{Device, DeviceOptions, GatherWay, Kind, LinearPath};
use crate::error::Error;
use crate::kv::{CacheBytes, KvMode, KvOptions, KvShape};
use crate::model::{self, Dtype};
use crate::notice::{self, Notice, Weight};
use crate::tokenizer::Tokenizer;
use crate::{Engine, engine};

/// What an engine handle stands for.
pub struct EngineObject {
    pub(super) engine: Engine,
    pub(super) tokenizer: Option<Tokenizer>,
    pub(super) chat: Option<ChatTemplate>,
    log: Log,
    pub(super) pool: Pool,
}

/// Levels of log messages, as in the header.
#[derive(Clone, Copy)]
pub(super) enum Level {
    Error = 1,
    Warn = 2,
    Info = 3,
    Debug = 4,
}

/// Whoever listens to an engine.
#[derive(Clone, Copy)]
struct Log {
    callback: Option<LogFn>,
    user_data: *mut c_void,
    level: i32,
}

// SAFETY: the pointer is only passed on; by the header's contract the callback is called on any thread.
unsafe impl Send for Log {}
// SAFETY: as above.
unsafe impl Sync for Log {}

impl Log {
    /// Sends a message.
    fn send(&self, level: Level, message: impl FnOnce() -> String) {
        let Some(callback) = self.callback.filter(|_| level as i32 <= self.level) else { return };
        let Ok(text) = CString::new(message().replace('\0', "\u{FFFD}")) else { return };
        // SAFETY: the caller's function and what it asked to be called with; the text lives until it returns.
        unsafe { callback(self.user_data, level as i32, text.as_ptr()) }
    }

    /// Whether somebody listens to all that the library has to say: else that stays for another engine's listener.
    fn takes_notices(&self) -> bool {
        self.callback.is_some() && self.level >= Level::Info as i32
    }

    fn notice(&self, notice: Notice) {
        let level = if notice.weight == Weight::Warning { Level::Warn } else { Level::Info };
        self.send(level, || as_called_here(notice.text));
    }

    /// Passes on what the library has had to say.
    fn notices(&self) {
        if self.takes_notices() {
            notice::fetch().into_iter().for_each(|notice| self.notice(notice));
        }
    }
}

impl EngineObject {
    fn load(spec: &str, options: &EngineOptions) -> Result<EngineObject> {
        if !(0..=Level::Debug as i32).contains(&options.log_level) {
            return Err(Fail::usage(format!(
                "log_level {}: must be 0 (none) or one of SPECACHE_LOG_*",
                options.log_level
            )));
        }
        let log = Log { callback: options.log, user_data: options.log_user_data, level: options.log_level };
        notice::keep();
        // It may take long, and what is said on the way may tell why it fails.
        let make = || EngineObject::make(spec, options, log);
        let made = if log.takes_notices() { notice::hear(move |notice| log.notice(notice), make) } else { make() };
        log.notices(); // of other threads
        let made = made?;
        made.log(Level::Info, || made.describe());
        Ok(made)
    }

    fn make(spec: &str, options: &EngineOptions, log: Log) -> Result<EngineObject> {
        let why_no_gpu = |device: &Device| {
            if let Some(why) = device.why_no_gpu() {
                log.send(Level::Info, || format!("the CPU computes: {why}"));
            }
        };
        let engine = Engine::load_with(spec, &device_options(options)?, why_no_gpu)?;
        EngineObject::around(engine, model::folder(spec)?.as_deref(), log)
    }

    /// An engine, with the tokenizer and the chat template of a folder.
    fn around(engine: Engine, folder: Option<&Path>, log: Log) -> Result<EngineObject> {
        let tokenizer = folder.map(Tokenizer::load).transpose()?.flatten();
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check_vocab(engine.model().config.vocab_size)?;
        }
        let chat = folder.map(ChatTemplate::load).transpose()?.flatten();
        if let Some(trace) = engine.device().trace() {
            trace.pause(true);
        }
        Ok(EngineObject { engine, tokenizer, chat, log, pool: Pool::default() })
    }

    /// One that nobody listens to.
    #[cfg(test)]
    pub(super) fn unheard(engine: Engine, folder: &Path) -> Result<EngineObject> {
        EngineObject::around(engine, Some(folder), Log { callback: None, user_data: std::ptr::null_mut(), level: 0 })
    }

    pub(super) fn describe(&self) -> String {
        let config = &self.engine.model().config;
        let (name, device) = (&self.engine.model().name, self.engine.device().describe());
        format!("{name}: {} layers, {} tokens in the vocabulary; {device}", config.n_layers, config.vocab_size)
    }

    /// Sends a message to whoever listens.
    pub(super) fn log(&self, level: Level, message: impl FnOnce() -> String) {
        self.log.send(level, message);
    }

    /// Passes on what the library has had to say.
    pub(super) fn log_notices(&self) {
        self.log.notices();
    }

    /// Runs a call for `n` sequences with buffers that it gives back. After a panic they are not used again.
    pub(super) fn with_buffers<T>(&self, n: usize, call: impl FnOnce(&mut Lent) -> T) -> T {
        let mut buffers = self.pool.lend(n);
        // Whoever listens is told of a panic before it goes on to `guard`, and not while it unwinds: a callback may call again.
        match catch_unwind(AssertUnwindSafe(|| call(&mut buffers))) {
            Ok(result) => {
                self.pool.give_back(buffers);
                self.log_notices();
                result
            }
            Err(panic) => {
                self.log(Level::Error, || "a call panicked: its sessions are dead; please report this bug".into());
                resume_unwind(panic)
            }
        }
    }
}

fn device_options(options: &EngineOptions) -> Result<DeviceOptions> {
    let mut choice = DeviceChoice::default();
    if !options.device.is_null() {
        // SAFETY: not NULL, so a C string by the header's contract.
        let device = unsafe { c_text(options.device, "device") }?;
        choice = DeviceChoice::from_str(device).map_err(|why| Fail::usage(format!("device {device:?}: {why}")))?;
    }
    if options.threads > 1024 {
        return Err(Fail::usage(format!("threads {}: at most 1024", options.threads)));
    }
    let linear = usize::try_from(options.linear).ok().and_then(|linear| LinearPath::ALL.get(linear));
    let linear =
        *linear.ok_or_else(|| Fail::usage(format!("linear {}: must be one of SPECACHE_LINEAR_*", options.linear)))?;
    let gathers = [None, Some(GatherWay::Gpu), Some(GatherWay::Cpu), Some(GatherWay::Auto)];
    let gather = usize::try_from(options.gather).ok().and_then(|gather| gathers.get(gather));
    let gather =
        *gather.ok_or_else(|| Fail::usage(format!("gather {}: must be one of SPECACHE_GATHER_*", options.gather)))?;
    if options.gather_threads > 256 {
        return Err(Fail::usage(format!("gather_threads {}: at most 256", options.gather_threads)));
    }
    Ok(DeviceOptions {
        choice,
        threads: (options.threads > 0).then_some(options.threads as usize),
        device_budget: (options.device_budget > 0).then_some(options.device_budget),
        host_budget: (options.host_kv_budget > 0).then_some(options.host_kv_budget),
        pin: (options.lock_memory != 0).then(|| Arc::new(Mlock) as Arc<dyn Pin>),
        trace: options.trace != 0,
        linear,
        gather,
        gather_threads: (options.gather_threads > 0).then_some(options.gather_threads as usize),
        ..DeviceOptions::default()
    })
}

/// The caller's ABI version: the same major, and no higher minor.
fn check_abi(version: u32) -> Result<()> {
    let (major, minor) = (version >> 16, version & 0xffff);
    let (own_major, own_minor) = (SPECACHE_ABI_VERSION >> 16, SPECACHE_ABI_VERSION & 0xffff);
    if major == own_major && (1..=own_minor).contains(&minor) {
        return Ok(());
    }
    Err(Fail::new(
        Status::Abi,
        format!(
            "this program was compiled for version {major}.{minor} of the ABI, the library has {own_major}.{own_minor}; \
             pass SPECACHE_ABI_VERSION, and compile with the header of the library that is installed"
        ),
    ))
}

/// The engine's form of KV options.
pub(super) fn kv_options(options: &KvOptionsC) -> Result<KvOptions> {
    let mode = usize::try_from(options.mode).ok().and_then(|mode| KvMode::ALL.get(mode));
    let mode = *mode.ok_or_else(|| Fail::usage(format!("mode {}: must be one of SPECACHE_KV_*", options.mode)))?;
    let dtype = match options.dtype {
        0 => None,
        1 => Some(Dtype::Bf16),
        2 => Some(Dtype::F16),
        3 => Some(Dtype::F32),
        other => return Err(Fail::usage(format!("dtype {other}: must be one of SPECACHE_DTYPE_*"))),
    };
    Ok(KvOptions {
        mode,
        bits: options.bits as usize,
        group_size: options.group_size as usize,
        residual_len: options.residual_len as usize,
        top_k: options.top_k as usize,
        dtype,
    })
}

/// A number of tokens; what is beyond a `usize` is beyond any context, which the engine says.
pub(super) fn tokens(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_engine_options_init(options: *mut EngineOptions, struct_size: u32) -> i32 {
    // SAFETY: the header's contract.
    guard(|| unsafe { structs::init(options, &structs::Sized32::defaults(), struct_size) })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_engine_create(
    abi_version: u32,
    model: *const c_char,
    options: *const EngineOptions,
    engine: *mut *mut EngineHandle,
) -> i32 {
    guard(|| {
        // SAFETY: the header's contract.
        unsafe { set(engine, std::ptr::null_mut(), "engine") }?;
        check_abi(abi_version)?;
        // SAFETY: as above.
        let (model, options) = unsafe { (c_text(model, "model")?, structs::read(options)?) };
        let made = EngineObject::load(model, &options)?;
        // SAFETY: as above.
        unsafe { set(engine, handles::add_engine(made), "engine") }
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn specache_engine_free(engine: *mut EngineHandle) {
    guard(|| {
        handles::free_engine(engine);
        Ok(())
    });
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_engine_model_info(engine: *mut EngineHandle, info: *mut ModelInfo) -> i32 {
    guard(|| {
        let engine = handles::engine(engine)?;
        let model = engine.engine.model();
        let config = &model.config;
        let filled = ModelInfo {
            vocab_size: config.vocab_size as u32, // all of these have caps far below 2^32
            n_layers: config.n_layers as u32,
            n_heads: config.n_heads as u32,
            n_kv_heads: config.n_kv_heads as u32,
            head_dim: config.head_dim as u32,
            hidden_size: config.hidden_size as u32,
            has_tokenizer: engine.tokenizer.is_some().into(),
            has_chat_template: engine.chat.is_some().into(),
            n_eos: config.eos_token_ids.len() as u32,
            max_positions: config.max_positions as u64,
            weight_bytes: model.weights.bytes(config.tie_word_embeddings),
            ..structs::Sized32::defaults()
        };
        // SAFETY: the header's contract.
        unsafe { structs::write(info, &filled) }
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_engine_eos_tokens(
    engine: *mut EngineHandle,
    ids: *mut u32,
    capacity: usize,
    n: *mut usize,
) -> i32 {
    guard(|| {
        let engine = handles::engine(engine)?;
        // SAFETY: the header's contract.
        unsafe { give(&engine.engine.model().config.eos_token_ids, ids, capacity, n, "ids") }
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_engine_describe(
    engine: *mut EngineHandle,
    text: *mut c_char,
    capacity: usize,
    n: *mut usize,
) -> i32 {
    // SAFETY: the header's contract.
    guard(|| unsafe { give_text(&handles::engine(engine)?.describe(), text, capacity, n) })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_engine_memory(engine: *mut EngineHandle, memory: *mut Memory) -> i32 {
    guard(|| {
        let engine = handles::engine(engine)?;
        let (model, device, pages) = (engine.engine.model(), engine.engine.device(), engine.engine.host_pages());
        let meter = device.device_memory();
        let filled = Memory {
            device_bytes: meter.used(),
            device_budget: meter.budget(),
            device_weight_bytes: meter.used_for(Kind::Weights),
            device_kv_bytes: meter.used_for(Kind::Kv),
            device_workspace_bytes: meter.used_for(Kind::Workspace),
            weight_bytes: model.weights.bytes(model.config.tie_word_embeddings),
            host_mapped_bytes: pages.bytes,
            host_kv_budget: device.host_memory().budget(),
            host_page_bytes: pages.page_bytes as u64,
            host_pages_leased: pages.leased as u64,
            host_pages_reserved: pages.reserved as u64,
            host_pages_free: (pages.free - pages.reserved) as u64,
            ..structs::Sized32::defaults()
        };
        // SAFETY: the header's contract.
        unsafe { structs::write(memory, &filled) }
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn specache_engine_trace(engine: *mut EngineHandle, on: i32) -> i32 {
    guard(|| {
        let engine = handles::engine(engine)?;
        engine.engine.device().trace().ok_or_else(not_traced)?.pause(on == 0);
        Ok(())
    })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_engine_trace_write(engine: *mut EngineHandle, path: *const c_char) -> i32 {
    guard(|| {
        let engine = handles::engine(engine)?;
        // SAFETY: the header's contract.
        let path = Path::new(unsafe { c_text(path, "path") }?);
        let trace = engine.engine.device().trace().ok_or_else(not_traced)?;
        let slices = trace.take();
        write_whole(path, |out| write_chrome(&slices, out)).map_err(|e| {
            trace.put_back(slices);
            Error::io(path, e).into()
        })
    })
}

/// Replaces a file by a whole one or leaves it as it is. What is no regular file (a pipe, say) is written at once.
fn write_whole(path: &Path, write: impl Fn(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let write_to = |path: &Path| {
        let mut out = BufWriter::new(File::create(path)?);
        write(&mut out)?;
        out.flush()
    };
    if path.metadata().is_ok_and(|there| !there.is_file()) {
        return write_to(path);
    }
    // Calls that write the same file at once each have a name of their own: the last one's stays.
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.{}.partial", std::process::id(), WRITTEN.fetch_add(1, Ordering::Relaxed)));
    let partial = path.with_file_name(name);
    write_to(&partial).and_then(|()| fs::rename(&partial, path)).inspect_err(|_| drop(fs::remove_file(&partial)))
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn specache_engine_measure_waits(engine: *mut EngineHandle, on: i32) -> i32 {
    guard(|| {
        handles::engine(engine)?.engine.device().measure_waits(on != 0);
        Ok(())
    })
}

fn not_traced() -> Fail {
    Fail::usage("this engine cannot be traced: set `trace` in the options that it is created with")
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_kv_options_init(options: *mut KvOptionsC, struct_size: u32) -> i32 {
    // SAFETY: the header's contract.
    guard(|| unsafe { structs::init(options, &structs::Sized32::defaults(), struct_size) })
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn specache_plan(
    abi_version: u32,
    model: *const c_char,
    options: *const KvOptionsC,
    max_tokens: u64,
    plan: *mut MemoryPlan,
) -> i32 {
    guard(|| {
        check_abi(abi_version)?;
        // SAFETY: the header's contract.
        let (model, options) = unsafe { (c_text(model, "model")?, structs::read(options)?) };
        let kv = kv_options(&options)?;
        let config = model::config_of(model)?;
        let bytes = engine::plan(&config, &kv, tokens(max_tokens))?;
        let weight = if config.dtype == Some(Dtype::F32) { 4 } else { 2 };
        let filled = MemoryPlan {
            packed_bytes: bytes.packed,
            wide_bytes: bytes.wide,
            slot_bytes: bytes.slots,
            load_bytes: bytes.loads,
            device_bytes: bytes.device(),
            prefill_bytes: CacheBytes::prefill_scratch(&KvShape::new(&config, &kv), &kv, tokens(max_tokens)),
            host_bytes: bytes.host,
            weight_bytes: config.n_weights().saturating_mul(weight),
            ..structs::Sized32::defaults()
        };
        // SAFETY: as above.
        unsafe { structs::write(plan, &filled) }
    })
}
