//! Sleeping on a number until somebody changes it: one system call wakes as many threads as wanted.
#![allow(unsafe_code)] // System calls.

use std::sync::atomic::AtomicU32;

/// Sleeps while `word` holds `value`. May return early: the caller looks again.
pub(crate) fn wait(word: &AtomicU32, value: u32) {
    let op = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: `word` is alive for the call, and a null timeout means none.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, value, std::ptr::null::<libc::timespec>()) };
}

/// Wakes up to `threads` that sleep on `word`.
pub(crate) fn wake(word: &AtomicU32, threads: u32) {
    let op = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: `word` is used as an address only.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, threads.min(i32::MAX as u32)) };
}
