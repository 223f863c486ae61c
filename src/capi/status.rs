//! What a call comes to: a status, and a text that stays with the calling thread.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;

use super::SPECACHE_ABI_VERSION;
use crate::error::Error;

/// Statuses, as in the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
#[allow(missing_docs)] // The header's words.
pub enum Status {
    Ok = 0,
    Failed = 1,
    Usage = 2,
    Model = 3,
    OutOfMemory = 4,
    Device = 5,
    Cancelled = 6,
    Busy = 7,
    Handle = 8,
    Abi = 9,
    Buffer = 10,
    Internal = 11,
}

impl Status {
    /// All of them, by number.
    pub const ALL: [Status; 12] = [
        Status::Ok,
        Status::Failed,
        Status::Usage,
        Status::Model,
        Status::OutOfMemory,
        Status::Device,
        Status::Cancelled,
        Status::Busy,
        Status::Handle,
        Status::Abi,
        Status::Buffer,
        Status::Internal,
    ];

    fn name(self) -> &'static CStr {
        match self {
            Status::Ok => c"ok",
            Status::Failed => c"failed",
            Status::Usage => c"wrong use",
            Status::Model => c"invalid model",
            Status::OutOfMemory => c"out of memory",
            Status::Device => c"device failed",
            Status::Cancelled => c"cancelled",
            Status::Busy => c"session is busy",
            Status::Handle => c"invalid handle",
            Status::Abi => c"other ABI version",
            Status::Buffer => c"buffer too small",
            Status::Internal => c"internal error",
        }
    }
}

/// Why a call fails.
#[derive(Clone, Debug)]
pub(super) struct Fail {
    pub status: Status,
    pub why: String,
}

/// A call's result.
pub(super) type Result<T> = std::result::Result<T, Fail>;

impl Fail {
    pub fn new(status: Status, why: impl Into<String>) -> Fail {
        Fail { status, why: why.into() }
    }

    pub fn usage(why: impl Into<String>) -> Fail {
        Fail::new(Status::Usage, why)
    }

    pub fn cancelled() -> Fail {
        Fail::new(Status::Cancelled, "cancelled")
    }

    pub fn internal(what: &str) -> Fail {
        Fail::new(Status::Internal, format!("internal error: {what}; this is a bug of specache, please report it"))
    }

    /// Stays with the calling thread, for `specache_last_error`.
    fn keep(&self) -> i32 {
        let text = CString::new(self.why.replace('\0', "\u{FFFD}")).expect("no NUL is left");
        // Within a destructor of thread-local data of the caller's, ours may be gone: the status alone tells then.
        let _text_is_lost = LAST_ERROR.try_with(|last| *last.borrow_mut() = text);
        self.status as i32
    }
}

/// Options as the command line calls them, and as they are called here.
const NAMES: [(&str, &str); 18] = [
    ("--kv-bits", "bits"),
    ("--kv-group", "group_size"),
    ("--kv-residual", "residual_len"),
    ("--kv-top-k", "top_k"),
    ("--kv-dtype", "dtype"),
    ("--kv ", "mode "),
    ("--vram-budget", "device_budget"),
    ("--host-kv-budget", "host_kv_budget"),
    ("--threads", "threads"),
    ("--linear", "linear"),
    ("--gather", "gather"),
    ("--device", "device"),
    ("--temp", "temperature"),
    ("--top-p", "top_p"),
    ("--min-p", "min_p"),
    ("--repeat-penalty", "repeat_penalty"),
    ("--mlock", "lock_memory"),
    ("--tokens", "ids"),
];

/// A text of the library, with its options as they are called here.
pub(super) fn as_called_here(text: String) -> String {
    NAMES.iter().fold(text, |text, (cli, here)| text.replace(cli, here))
}

impl From<Error> for Fail {
    fn from(error: Error) -> Fail {
        let status = match &error {
            Error::Io { .. } | Error::NotFinite(_) => Status::Failed,
            Error::Usage(_) => Status::Usage,
            Error::Model { .. } => Status::Model,
            Error::OutOfMemory { .. } => Status::OutOfMemory,
            Error::Device(_) => Status::Device,
            Error::Interrupted => Status::Cancelled,
        };
        let why = error.to_string();
        match error {
            Error::Usage(_) | Error::OutOfMemory { .. } => Fail { status, why: as_called_here(why) },
            Error::Interrupted => Fail::cancelled(),
            _ => Fail { status, why },
        }
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs a call: what it returns, or panics with, becomes a status.
pub(super) fn guard(call: impl FnOnce() -> Result<()>) -> i32 {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => Status::Ok as i32,
        Ok(Err(fail)) => fail.keep(),
        Err(panic) => Fail::internal(panic_text(&*panic)).keep(),
    }
}

/// What a panic says.
pub(super) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic without words")
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn specache_abi_version() -> u32 {
    SPECACHE_ABI_VERSION
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn specache_version() -> *const c_char {
    static VERSION: LazyLock<CString> = LazyLock::new(|| {
        let version = match option_env!("SPECACHE_COMMIT") {
            Some(commit) => format!("{} ({commit})", env!("CARGO_PKG_VERSION")),
            None => env!("CARGO_PKG_VERSION").to_string(),
        };
        CString::new(version).unwrap_or_default()
    });
    VERSION.as_ptr()
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn specache_status_name(status: i32) -> *const c_char {
    let known = Status::ALL.into_iter().find(|s| *s as i32 == status);
    known.map_or(c"unknown status", Status::name).as_ptr()
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn specache_last_error() -> *const c_char {
    // At a thread's very end there is no text any more.
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last_error() -> String {
        // SAFETY: a C string of this thread, which nothing changes meanwhile.
        unsafe { CStr::from_ptr(specache_last_error()) }.to_str().unwrap().to_string()
    }

    #[test]
    fn panics_become_a_status() {
        assert_eq!(guard(|| panic!("layer {}", 3)), Status::Internal as i32);
        assert!(last_error().contains("layer 3") && last_error().contains("report"), "{}", last_error());
        assert_eq!(guard(|| std::panic::panic_any(5)), Status::Internal as i32);
        assert_eq!(guard(|| Err(Fail::usage("with\0NUL"))), Status::Usage as i32);
        assert_eq!(last_error(), "with\u{FFFD}NUL");
    }

    #[test]
    fn errors_speak_of_options_as_the_header_does() {
        let fail = Fail::from(Error::Usage("--kv-group 64 does not divide 96: use --kv-group 32 or --kv full".into()));
        assert_eq!(fail.why, "group_size 64 does not divide 96: use group_size 32 or mode full");
    }

    #[test]
    fn numbers_are_places() {
        assert!(Status::ALL.iter().enumerate().all(|(i, s)| *s as usize == i));
    }
}
