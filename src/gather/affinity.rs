//! What the kernel is asked about CPUs and memory: which CPUs a thread may use, and where a page lies.
#![allow(unsafe_code)] // System calls.

use std::io;

/// 64-bit words of a CPU mask: 8,192 CPUs, the most that Linux supports (`cpu_set_t` of the C library ends at 1,024).
const WORDS: usize = 128;

/// The CPUs that this thread may run on, ascending.
pub(crate) fn allowed() -> io::Result<Vec<usize>> {
    let mut mask = [0u64; WORDS];
    // SAFETY: the kernel writes at most `size_of_val(&mask)` bytes to the mask, which is alive.
    let bytes = unsafe { libc::syscall(libc::SYS_sched_getaffinity, 0, size_of_val(&mask), mask.as_mut_ptr()) };
    if bytes < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((0..WORDS * 64).filter(|cpu| mask[cpu / 64] >> (cpu % 64) & 1 == 1).collect())
}

/// Binds the calling thread to `cpus`.
///
/// # Errors
/// The system's reason: none of them is allowed, or a sandbox forbids the call.
pub(crate) fn pin(cpus: &[usize]) -> io::Result<()> {
    let mut mask = [0u64; WORDS];
    for cpu in cpus.iter().filter(|&&cpu| cpu < WORDS * 64) {
        mask[cpu / 64] |= 1 << (cpu % 64);
    }
    // SAFETY: the kernel reads `size_of_val(&mask)` bytes of the mask, which is alive.
    let status = unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, size_of_val(&mask), mask.as_ptr()) };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The CPU that the calling thread runs on just now.
pub(crate) fn current() -> Option<usize> {
    // SAFETY: takes no arguments.
    usize::try_from(unsafe { libc::sched_getcpu() }).ok()
}

/// The node that holds the page at `address`; `None` if the page was never touched, or if the kernel does not tell
/// (no NUMA support, a sandbox). A system call: for diagnostics and for start-up, not for every row.
pub fn node_of_address<T>(address: *const T) -> Option<super::NodeId> {
    const PAGE_BYTES: usize = 4096;
    let pages = [address as usize & !(PAGE_BYTES - 1)];
    let mut status = [-1i32];
    // With no list of target nodes, move_pages moves nothing and reports where each page is. Process 0 is this one.
    // SAFETY: the kernel reads one address from `pages`, which it does not access, and writes one i32 to `status`.
    let done = unsafe {
        let nodes = std::ptr::null::<i32>();
        libc::syscall(libc::SYS_move_pages, 0, 1usize, pages.as_ptr(), nodes, status.as_mut_ptr(), 0)
    };
    // A status below 0 is an error number of its own: most often ENOENT, no page there yet.
    if done == 0 { u32::try_from(status[0]).ok().map(super::NodeId) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_touched_page_has_a_node_and_an_unmapped_one_has_none() {
        let touched = vec![1u8; 1 << 16];
        let node = node_of_address(touched.as_ptr());
        // A kernel without NUMA, or a sandbox, may refuse to say.
        assert!(node.is_none_or(|node| node.0 < 1024), "{node:?}");
        assert_eq!(node_of_address(std::ptr::null::<u8>()), None);
    }

    #[test]
    fn pinned_to_what_is_allowed() {
        std::thread::spawn(|| {
            let cpus = allowed().expect("every Linux tells");
            let one = &cpus[cpus.len() - 1..];
            pin(one).expect("an allowed CPU");
            assert_eq!(allowed().unwrap(), one);
            assert_eq!(current(), Some(one[0]));
            assert!(pin(&[]).is_err());
        })
        .join()
        .unwrap();
    }
}
