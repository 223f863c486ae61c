//! Structs that begin with `struct_size`: an older caller's are shorter, and what they lack has its default.

use std::ffi::{c_char, c_void};
use std::ptr;

use super::status::{Fail, Result, Status};

/// A struct of the header that begins with `struct_size`.
///
/// # Safety
/// `repr(C)`, begins with a `u32`, and any bytes of a caller's are a value.
pub(super) unsafe trait Sized32: Copy {
    /// Name in the header.
    const NAME: &'static str;
    /// Where its fields end: the sizes that a caller's struct can have had.
    const ENDS: &'static [usize];
    /// Its defaults, `struct_size` included.
    fn defaults() -> Self;
}

/// Declares such a struct, and the numbers that belong to it.
macro_rules! sized {
    ($(#[$doc:meta])* $name:ident = $c_name:literal { $($field:ident: $type:ty = $default:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        #[repr(C)]
        #[allow(missing_docs)] // The header's words.
        pub struct $name {
            pub struct_size: u32,
            $(pub $field: $type,)*
        }

        // SAFETY: repr(C), a `u32` first; numbers and pointers, which are not used without a check, take any bytes.
        unsafe impl Sized32 for $name {
            const NAME: &'static str = $c_name;
            const ENDS: &'static [usize] =
                &[$(std::mem::offset_of!($name, $field) + size_of::<$type>(),)*];

            fn defaults() -> Self {
                $name { struct_size: size_of::<$name>() as u32, $($field: $default,)* }
            }
        }
    };
}

/// `specache_log_fn`.
pub type LogFn = unsafe extern "C" fn(*mut c_void, i32, *const c_char);

sized! {
    /// `specache_engine_options`.
    EngineOptions = "specache_engine_options" {
        threads: u32 = 0,
        device: *const c_char = ptr::null(),
        device_budget: u64 = 0,
        host_kv_budget: u64 = 0,
        lock_memory: u32 = 0,
        trace: u32 = 0,
        log: Option<LogFn> = None,
        log_user_data: *mut c_void = ptr::null_mut(),
        log_level: i32 = 3,
        linear: i32 = 0,
        gather: i32 = 0,
        gather_threads: u32 = 0,
    }
}

sized! {
    /// `specache_kv_options`.
    KvOptionsC = "specache_kv_options" {
        mode: i32 = 4,
        bits: u32 = 2,
        group_size: u32 = 64,
        residual_len: u32 = 64,
        top_k: u32 = 64,
        dtype: i32 = 0,
    }
}

sized! {
    /// `specache_sampling_options`.
    SamplingOptionsC = "specache_sampling_options" {
        temperature: f32 = 0.0,
        top_k: u32 = 0,
        top_p: f32 = 1.0,
        min_p: f32 = 0.0,
        repeat_penalty: f32 = 1.0,
        seed: u64 = 0,
    }
}

sized! {
    /// `specache_model_info`.
    ModelInfo = "specache_model_info" {
        vocab_size: u32 = 0,
        n_layers: u32 = 0,
        n_heads: u32 = 0,
        n_kv_heads: u32 = 0,
        head_dim: u32 = 0,
        hidden_size: u32 = 0,
        has_tokenizer: u32 = 0,
        has_chat_template: u32 = 0,
        n_eos: u32 = 0,
        max_positions: u64 = 0,
        weight_bytes: u64 = 0,
    }
}

sized! {
    /// `specache_memory`.
    Memory = "specache_memory" {
        reserved: u32 = 0,
        device_bytes: u64 = 0,
        device_budget: u64 = 0,
        device_weight_bytes: u64 = 0,
        device_kv_bytes: u64 = 0,
        device_workspace_bytes: u64 = 0,
        weight_bytes: u64 = 0,
        host_mapped_bytes: u64 = 0,
        host_kv_budget: u64 = 0,
        host_page_bytes: u64 = 0,
        host_pages_leased: u64 = 0,
        host_pages_reserved: u64 = 0,
        host_pages_free: u64 = 0,
    }
}

sized! {
    /// `specache_memory_plan`.
    MemoryPlan = "specache_memory_plan" {
        reserved: u32 = 0,
        packed_bytes: u64 = 0,
        wide_bytes: u64 = 0,
        slot_bytes: u64 = 0,
        load_bytes: u64 = 0,
        device_bytes: u64 = 0,
        prefill_bytes: u64 = 0,
        host_bytes: u64 = 0,
        weight_bytes: u64 = 0,
    }
}

sized! {
    /// `specache_token`.
    TokenC = "specache_token" {
        id: u32 = u32::MAX,
        index: u64 = 0,
        text: *const c_char = c"".as_ptr(),
        n_bytes: u64 = 0,
        is_eos: u32 = 0,
        reserved: u32 = 0,
    }
}

sized! {
    /// `specache_session_stats`.
    SessionStats = "specache_session_stats" {
        n_layers: u32 = 0,
        n_tokens: u64 = 0,
        max_tokens: u64 = 0,
        steps: u64 = 0,
        hit_rate: f64 = f64::NAN,
        acceptance: f64 = f64::NAN,
        accepted: u64 = 0,
        compared: u64 = 0,
        fetched_bytes: u64 = 0,
        pre_decode_bytes: u64 = 0,
        offloaded_bytes: u64 = 0,
        exposed_ns: u64 = 0,
        packed_bytes: u64 = 0,
        wide_bytes: u64 = 0,
        slot_bytes: u64 = 0,
        load_bytes: u64 = 0,
        host_bytes: u64 = 0,
        exposed_steps: u64 = 0,
    }
}

/// `specache_chat_message`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
#[allow(missing_docs)] // The header's words.
pub struct ChatMessage {
    pub role: *const c_char,
    pub content: *const c_char,
}

/// `specache_layer_stats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)] // The header's words.
pub struct LayerStats {
    pub hits: u64,
    pub hits_of: u64,
    pub fetched: u64,
    pub selected: u64,
}

/// What a caller's struct has room for.
fn check_size<T: Sized32>(struct_size: usize) -> Result<usize> {
    match T::ENDS.contains(&struct_size) || struct_size == size_of::<T>() {
        true => Ok(struct_size),
        false => {
            let (name, known) = (T::NAME, size_of::<T>());
            let fix = "set it to sizeof, with the init function where there is one";
            Err(Fail::new(
                Status::Abi,
                format!(
                    "struct_size of {name} is {struct_size}, of which this library, which knows {known} bytes, has no version; {fix}"
                ),
            ))
        }
    }
}

fn check_pointer<T: Sized32>(data: *const T) -> Result<()> {
    match data {
        data if data.is_null() => Err(Fail::usage(format!("{} is NULL", T::NAME))),
        data if !data.is_aligned() => Err(Fail::usage(format!("{}: the pointer is not aligned", T::NAME))),
        _ => Ok(()),
    }
}

/// A caller's options; the defaults for NULL, and for what an older struct lacks.
///
/// # Safety
/// `from` is NULL or points to as many bytes as its `struct_size` says.
pub(super) unsafe fn read<T: Sized32>(from: *const T) -> Result<T> {
    let mut value = T::defaults();
    if from.is_null() {
        return Ok(value);
    }
    check_pointer(from)?;
    // SAFETY: begins with a `u32`.
    let size = check_size::<T>(unsafe { from.cast::<u32>().read() } as usize)?;
    // SAFETY: that many bytes are there, and no more than `value` has.
    unsafe { ptr::copy_nonoverlapping(from.cast::<u8>(), (&raw mut value).cast::<u8>(), size) };
    Ok(value)
}

/// Fills a caller's struct as far as it goes. Its `struct_size` stays.
///
/// # Safety
/// As [`read`], to be written.
pub(super) unsafe fn write<T: Sized32>(to: *mut T, value: &T) -> Result<()> {
    check_pointer(to)?;
    // SAFETY: begins with a `u32`.
    let size = check_size::<T>(unsafe { to.cast::<u32>().read() } as usize)?;
    let skip = size_of::<u32>();
    // SAFETY: that many bytes are there, and no more than `value` has; both structs are elsewhere.
    unsafe {
        ptr::copy_nonoverlapping(ptr::from_ref(value).cast::<u8>().add(skip), to.cast::<u8>().add(skip), size - skip)
    };
    Ok(())
}

/// Fills a caller's struct of that size with defaults, and its `struct_size`.
///
/// # Safety
/// `to` is NULL or may be written so far.
pub(super) unsafe fn init<T: Sized32>(to: *mut T, value: &T, struct_size: u32) -> Result<()> {
    check_pointer(to)?;
    check_size::<T>(struct_size as usize)?;
    // SAFETY: at least a `u32` long, as every size that passes the check.
    unsafe { to.cast::<u32>().write(struct_size) };
    // SAFETY: as above.
    unsafe { write(to, value) }
}
