//! Ctrl-C for command lines, and the system's requests to end: the first one asks the engine to stop, the second one ends
//! the process.
#![allow(unsafe_code)] // Signal handlers.

use std::ffi::{CString, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Whether the process has been asked to end (SIGTERM, SIGHUP), and not only to stop what it does (SIGINT).
static ENDING: AtomicBool = AtomicBool::new(false);

/// Exit code of an interrupted process, as shells count it: 128 + SIGINT.
const INTERRUPTED: i32 = 130;

/// The flag of the engine that works now; null while none does.
static FLAG: AtomicPtr<AtomicBool> = AtomicPtr::new(null_mut());

/// Files that are not complete, by their paths; null where there is none. More than a command ever writes at once.
static UNFINISHED: [AtomicPtr<c_char>; 16] = [const { AtomicPtr::new(null_mut()) }; 16];

/// Makes Ctrl-C (SIGTERM and SIGHUP too) set the flag of the engine at work ([`forward`]). Without one, or the second time, it ends the process
/// at once with exit code 130.
pub fn install() {
    let action = SigAction::new(SigHandler::Handler(on_interrupt), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler does nothing but atomic accesses, `unlink` and `_exit`, which are safe in a signal handler.
        // Without a handler (which no Linux refuses) the signal ends the process as it does by default.
        let _ = unsafe { sigaction(signal, &action) };
    }
}

/// Until the guard is dropped, Ctrl-C sets `flag` (see [`crate::Engine::interrupt_flag`]) instead of ending the process.
pub fn forward(flag: Arc<AtomicBool>) -> Forwarding {
    // The reference is leaked (a few bytes per engine), so that a handler that runs at any time finds it.
    FLAG.store(Arc::into_raw(flag).cast_mut(), Ordering::SeqCst);
    Forwarding(())
}

/// While this lives, Ctrl-C is left to the engine.
#[must_use = "Ctrl-C ends the process when this is dropped"]
pub struct Forwarding(());

impl Drop for Forwarding {
    fn drop(&mut self) {
        FLAG.store(null_mut(), Ordering::SeqCst);
    }
}

/// A file that is removed if a signal ends the process before the guard is dropped. Take the guard before the file is made.
pub fn unfinished(file: &Path) -> Unfinished {
    let Ok(path) = CString::new(file.as_os_str().as_bytes()) else { return Unfinished(None) };
    let path = path.into_raw(); // leaked, as above
    let free =
        |slot: &AtomicPtr<c_char>| slot.compare_exchange(null_mut(), path, Ordering::SeqCst, Ordering::SeqCst).is_ok();
    Unfinished(UNFINISHED.iter().position(free))
}

/// While this lives, a file goes when a signal ends the process.
#[must_use = "the file stays when this is dropped"]
pub struct Unfinished(Option<usize>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.0.inspect(|&i| UNFINISHED[i].store(null_mut(), Ordering::SeqCst));
    }
}

/// Whether SIGTERM or SIGHUP has come: what goes on after Ctrl-C ends then, too.
pub fn is_ending() -> bool {
    ENDING.load(Ordering::SeqCst)
}

extern "C" fn on_interrupt(signal: i32) {
    if signal != libc::SIGINT {
        ENDING.store(true, Ordering::SeqCst);
    }
    let flag = FLAG.load(Ordering::SeqCst);
    // SAFETY: null or from `Arc::into_raw` of a reference that is never given back, so it lives as long as the process.
    let again = unsafe { flag.as_ref() }.is_none_or(|flag| flag.swap(true, Ordering::SeqCst));
    if again {
        for slot in &UNFINISHED {
            let path = slot.load(Ordering::SeqCst);
            if !path.is_null() {
                // SAFETY: async-signal-safe; a C string that is never given back.
                unsafe { libc::unlink(path) };
            }
        }
        // SAFETY: async-signal-safe; ends the process.
        unsafe { libc::_exit(INTERRUPTED) }
    }
}
