//! Pointers and lengths of C become slices and texts, and results go into the caller's buffers.

use std::ffi::{CStr, c_char};
use std::ptr;

use super::status::{Fail, Result, Status};
use crate::context::MAX_CONTEXT;

/// A list that the caller owns. Its length is checked against what a context can have, so that a wild one is not read.
///
/// # Safety
/// `data` is NULL or points to `n` values that stay as they are for `'a`.
pub(super) unsafe fn slice<'a, T>(data: *const T, n: usize, what: &str) -> Result<&'a [T]> {
    if n == 0 {
        return Ok(&[]);
    }
    check(data, what)?;
    if n > MAX_CONTEXT {
        return Err(Fail::usage(format!("{what}: {n} entries are too many; at most {MAX_CONTEXT}")));
    }
    // SAFETY: the caller's promise; not NULL, and `MAX_CONTEXT` values of any struct here are below `isize::MAX` bytes.
    Ok(unsafe { std::slice::from_raw_parts(data, n) })
}

/// As [`fn@slice`], to be written. Nobody else uses it meanwhile.
///
/// # Safety
/// As [`fn@slice`].
pub(super) unsafe fn slice_mut<'a, T>(data: *mut T, n: usize, what: &str) -> Result<&'a mut [T]> {
    // SAFETY: the caller's promise.
    unsafe { slice(data.cast_const(), n, what) }?;
    // SAFETY: as above, and checked above.
    Ok(if n == 0 { &mut [] } else { unsafe { std::slice::from_raw_parts_mut(data, n) } })
}

/// A text of so many bytes.
///
/// # Safety
/// As [`fn@slice`].
pub(super) unsafe fn text<'a>(data: *const c_char, n: usize, what: &str) -> Result<&'a str> {
    // SAFETY: the caller's promise.
    utf8(unsafe { slice(data.cast::<u8>(), n, what) }?, what)
}

/// A C string.
///
/// # Safety
/// `data` is NULL or a C string that stays as it is for `'a`.
pub(super) unsafe fn c_text<'a>(data: *const c_char, what: &str) -> Result<&'a str> {
    check(data, what)?;
    // SAFETY: the caller's promise; not NULL.
    utf8(unsafe { CStr::from_ptr(data) }.to_bytes(), what)
}

fn utf8<'a>(bytes: &'a [u8], what: &str) -> Result<&'a str> {
    let wrong = |e: std::str::Utf8Error| Fail::usage(format!("{what}: byte {} is not valid UTF-8", e.valid_up_to()));
    std::str::from_utf8(bytes).map_err(wrong)
}

fn check<T>(data: *const T, what: &str) -> Result<()> {
    if data.is_null() {
        return Err(Fail::usage(format!("{what} is NULL")));
    }
    match data.is_aligned() {
        true => Ok(()),
        false => Err(Fail::usage(format!("{what}: the pointer is not aligned to {} bytes", align_of::<T>()))),
    }
}

/// Where one value goes; it is written at once, so that it has a value whatever follows.
///
/// # Safety
/// `to` is NULL or may be written.
pub(super) unsafe fn set<T>(to: *mut T, value: T, what: &str) -> Result<()> {
    check(to, what)?;
    // SAFETY: the caller's promise; not NULL and aligned.
    unsafe { to.write(value) };
    Ok(())
}

/// As [`fn@set`], where NULL means that nobody wants to know.
///
/// # Safety
/// As [`fn@set`].
pub(super) unsafe fn set_if<T>(to: *mut T, value: T, what: &str) -> Result<()> {
    // SAFETY: the caller's promise.
    if to.is_null() { Ok(()) } else { unsafe { set(to, value, what) } }
}

/// Gives a list to the caller by the rules of the header: `*n` always, the values if there is room for all.
///
/// # Safety
/// `to` is NULL or may be written `capacity` times, `n` may be written.
pub(super) unsafe fn give<T: Copy>(values: &[T], to: *mut T, capacity: usize, n: *mut usize, what: &str) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { give_with(values, None, to, capacity, n, what) }
}

/// As [`fn@give`], with a NUL behind it that `*n` does not count.
///
/// # Safety
/// As [`fn@give`].
pub(super) unsafe fn give_text(value: &str, to: *mut c_char, capacity: usize, n: *mut usize) -> Result<()> {
    // SAFETY: the caller's promise; `c_char` and `u8` are of one size.
    unsafe { give_with(value.as_bytes(), Some(0), to.cast::<u8>(), capacity, n, "text") }
}

/// # Safety
/// As [`fn@give`].
unsafe fn give_with<T: Copy>(
    values: &[T],
    end: Option<T>,
    to: *mut T,
    capacity: usize,
    n: *mut usize,
    what: &str,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { set(n, values.len(), "n") }?;
    if to.is_null() && capacity == 0 {
        return Ok(());
    }
    check(to, what)?;
    let needed = values.len() + usize::from(end.is_some());
    if capacity < needed {
        return Err(Fail::new(Status::Buffer, format!("{what}: room for {capacity}, {needed} are needed")));
    }
    // SAFETY: `to` has room for `needed` values, by the caller's promise and the check above; Rust's own memory is elsewhere.
    unsafe {
        ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
        if let Some(end) = end {
            to.add(values.len()).write(end);
        }
    }
    Ok(())
}
