//! Pinned host memory: what keeps a range resident, so that a device may copy from it at any time.
#![allow(unsafe_code)] // mlock, munlock, getrlimit.

use std::io;
use std::ptr::NonNull;

/// Keeps ranges of host memory resident. Called once per chunk of an arena, from any thread; see
/// [`super::arena::ArenaOptions::pin`].
pub trait Pin: Send + Sync {
    /// Pins the mapped range of `bytes` bytes from `start` on, both multiples of the system's page size.
    ///
    /// # Errors
    /// Why the range stays pageable and what the user can change, in one line. The range is then used as it is, unless
    /// [`Pin::is_required`].
    fn pin(&self, start: NonNull<u8>, bytes: usize) -> Result<(), String>;

    /// Whether pageable memory is of no use: then whoever asks for pages has them pinned, or hears why not.
    fn is_required(&self) -> bool {
        false
    }

    /// Undoes one successful [`Pin::pin`], with the same arguments, before the range is unmapped.
    fn unpin(&self, start: NonNull<u8>, bytes: usize);
}

/// Pins with `mlock`: what there is without a GPU. Bounded by `RLIMIT_MEMLOCK` unless the process has `CAP_IPC_LOCK`.
pub struct Mlock;

impl Pin for Mlock {
    fn pin(&self, start: NonNull<u8>, bytes: usize) -> Result<(), String> {
        // SAFETY: mlock reads and writes no byte of the range; it fails where nothing is mapped.
        if unsafe { libc::mlock(start.as_ptr().cast(), bytes) } == 0 {
            return Ok(());
        }
        Err(refusal(bytes as u64, &io::Error::last_os_error(), memlock_limit(), locked_bytes()))
    }

    fn unpin(&self, start: NonNull<u8>, bytes: usize) {
        // SAFETY: as for mlock. A failure leaves the range locked, which unmapping it ends.
        unsafe { libc::munlock(start.as_ptr().cast(), bytes) };
    }
}

/// The soft limit of locked memory in bytes; `None`: none.
pub fn memlock_limit() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the answer.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) } == 0;
    (known && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// What this process has locked, in bytes; `None` where the kernel does not tell.
pub fn locked_bytes() -> Option<u64> {
    parse_locked(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// The line `VmLck:      64 kB` of a process's status.
fn parse_locked(status: &str) -> Option<u64> {
    let kib = status.lines().find_map(|line| line.strip_prefix("VmLck:"))?.trim().strip_suffix("kB")?;
    kib.trim().parse::<u64>().ok()?.checked_mul(1 << 10)
}

/// What is needed, what there is, and what the user can change.
fn refusal(needed: u64, error: &io::Error, limit: Option<u64>, locked: Option<u64>) -> String {
    let bytes = |known: Option<u64>, unknown: &str| known.map_or(unknown.to_string(), |n| format!("{n} bytes"));
    let available = match limit {
        Some(limit) => bytes(locked.map(|locked| limit.saturating_sub(locked)), "an unknown number"),
        None => "all".into(),
    };
    format!(
        "mlock of {needed} bytes was refused ({error}): the limit RLIMIT_MEMLOCK is {}, {} are locked already (VmLck), {available} \
         are available; raise the limit with `ulimit -l unlimited` (systemd: LimitMEMLOCK=infinity, containers: --ulimit \
         memlock=-1)",
        bytes(limit, "unlimited"),
        bytes(locked, "an unknown number"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_limit_and_the_fix() {
        let refused = io::Error::from_raw_os_error(libc::ENOMEM);
        let text = refusal(64 << 20, &refused, Some(8 << 20), Some(3 << 20));
        for part in [
            "mlock of 67108864 bytes",
            "RLIMIT_MEMLOCK is 8388608 bytes",
            "3145728 bytes are locked already",
            "5242880 bytes are available",
            "ulimit -l unlimited",
            "LimitMEMLOCK",
            "memlock=-1",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let text = refusal(1 << 20, &refused, None, None);
        assert!(text.contains("is unlimited") && text.contains("an unknown number are locked"), "{text}");
    }

    #[test]
    fn locked_bytes_are_read_from_the_status() {
        assert_eq!(parse_locked("VmPin:\t      8 kB\nVmLck:\t     64 kB\nVmHWM:\t 1 kB\n"), Some(64 << 10));
        assert_eq!(parse_locked("VmPin:\t      8 kB\n"), None);
        assert_eq!(parse_locked("VmLck:\t   many kB\n"), None);
    }
}
