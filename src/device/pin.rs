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
    /// Why the range stays pageable and what the user can change, in one line. The range is then used as it is.
    fn pin(&self, start: NonNull<u8>, bytes: usize) -> Result<(), String>;

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
        Err(refusal(bytes, &io::Error::last_os_error(), memlock_limit()))
    }

    fn unpin(&self, start: NonNull<u8>, bytes: usize) {
        // SAFETY: as for mlock. A failure leaves the range locked, which unmapping it ends.
        unsafe { libc::munlock(start.as_ptr().cast(), bytes) };
    }
}

/// The soft limit of locked memory in bytes; `None`: none.
fn memlock_limit() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the answer.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) } == 0;
    (known && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

fn refusal(bytes: usize, error: &io::Error, limit: Option<u64>) -> String {
    let limit = limit.map_or("unlimited".to_string(), |l| format!("{} KiB", l >> 10));
    format!(
        "mlock of {} KiB more was refused ({error}); the limit RLIMIT_MEMLOCK is {limit}: raise it with \
         `ulimit -l unlimited` (systemd: LimitMEMLOCK=infinity, containers: --ulimit memlock=-1)",
        bytes >> 10
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_limit_and_the_fix() {
        let text = refusal(64 << 20, &io::Error::from_raw_os_error(libc::ENOMEM), Some(8 << 20));
        for part in ["65536 KiB", "RLIMIT_MEMLOCK is 8192 KiB", "ulimit -l unlimited", "LimitMEMLOCK", "memlock=-1"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(refusal(1 << 20, &io::Error::from_raw_os_error(libc::EAGAIN), None).contains("is unlimited"));
    }
}
