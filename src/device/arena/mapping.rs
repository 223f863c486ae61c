//! Memory of the system: mapped with huge pages where there are any, bound to a NUMA node, touched. Whoever maps it unmaps it.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::ptr::{self, NonNull};

use crate::device::buffer::Meter;
use crate::error::Result;

/// What the system maps and pins by.
pub(super) const SYSTEM_PAGE: usize = 4 << 10;
/// A huge page, and the first chunk of an arena.
pub(super) const HUGE_PAGE: usize = 2 << 20;
/// The byte of poisoned memory: NaN as f32, fp16 and bf16, an absurd position as u32.
pub(crate) const POISON: u8 = 0xFF;

/// Which huge pages to try.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Reserved ones (hugetlbfs), else transparent ones, else none.
    #[default]
    Auto,
    /// Transparent ones, else none.
    Transparent,
    /// None.
    Never,
}

/// The memory that an arena got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// Reserved huge pages of 2 MiB.
    HugeTlb,
    /// Transparent huge pages, where the kernel finds free ones.
    TransparentHuge,
    /// Pages of 4 KiB.
    Plain,
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            MemoryKind::HugeTlb => "reserved huge pages",
            MemoryKind::TransparentHuge => "transparent huge pages",
            MemoryKind::Plain => "4-KiB pages",
        })
    }
}

/// Where the memory of an arena lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placement {
    /// On this NUMA node, and on others only when it is full.
    Node(usize),
    /// Wherever the kernel puts it, and why.
    Anywhere(Cow<'static, str>),
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Placement::Node(node) => write!(f, "NUMA node {node}"),
            Placement::Anywhere(why) => write!(f, "no NUMA binding: {why}"),
        }
    }
}

/// Mapped memory. The arena that holds it unmaps it.
pub(super) struct Mapping {
    pub(super) base: NonNull<u8>,
    pub(super) bytes: usize,
    pub(super) kind: MemoryKind,
}

// SAFETY: a range of addresses, which any thread may know.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserved huge pages, whole ones.
    pub(super) fn reserved_huge(bytes: usize) -> io::Result<Mapping> {
        if !can_populate() {
            return Err(io::ErrorKind::Unsupported.into()); // they could be refused by nothing but a fault
        }
        let base = mmap(bytes.next_multiple_of(HUGE_PAGE), libc::MAP_HUGETLB | libc::MAP_HUGE_2MB)?;
        Ok(Mapping { base, bytes: bytes.next_multiple_of(HUGE_PAGE), kind: MemoryKind::HugeTlb })
    }

    /// Memory that is not reserved for huge pages, but may come to lie in some.
    pub(super) fn ordinary(bytes: usize, huge_pages: HugePages) -> io::Result<Mapping> {
        let base = mmap_aligned(bytes)?;
        // SAFETY: just mapped.
        let kind = unsafe { advise(base, bytes, huge_pages) };
        Ok(Mapping { base, bytes, kind })
    }

    pub(super) fn unmap(&mut self) {
        // SAFETY: the arena is going, and every lease of a page holds it (see `kv::slab`).
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// A mapping of `bytes` bytes that the meter counts: of reserved huge pages if they, and the budget, have room for whole
/// ones.
pub(super) fn map_metered(bytes: usize, huge_pages: HugePages, meter: &Meter, what: &str) -> Result<Mapping> {
    // One of them for less than its size would be taken from those who need it.
    if huge_pages == HugePages::Auto
        && bytes >= HUGE_PAGE
        && let Ok(mut mapping) = Mapping::reserved_huge(bytes)
    {
        if meter.take(mapping.bytes as u64, what).is_ok() {
            return Ok(mapping);
        }
        mapping.unmap();
    }
    meter.take(bytes as u64, what)?;
    Mapping::ordinary(bytes, huge_pages).map_err(|_| {
        meter.give_back(bytes as u64);
        meter.system_refusal(bytes as u64, what)
    })
}

pub(super) fn mmap(bytes: usize, flags: i32) -> io::Result<NonNull<u8>> {
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is there.
    unsafe { mmap_at(ptr::null_mut(), bytes, flags) }
}

/// # Safety
/// With `MAP_FIXED` what is mapped at `at` is lost: nobody uses it.
pub(super) unsafe fn mmap_at(at: *mut u8, bytes: usize, flags: i32) -> io::Result<NonNull<u8>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
    // SAFETY: the caller's promise.
    let base = unsafe { libc::mmap(at.cast(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))
}

/// A mapping that begins at a multiple of 2 MiB: one huge page more is mapped, and what sticks out is unmapped.
pub(super) fn mmap_aligned(bytes: usize) -> io::Result<NonNull<u8>> {
    let spare = bytes.checked_add(HUGE_PAGE).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
    let wide = mmap(spare, 0)?;
    let before = wide.as_ptr().align_offset(HUGE_PAGE);
    // SAFETY: before <= 2 MiB, so the aligned range and what sticks out all lie in the wide mapping; nobody knows the
    // latter's addresses.
    unsafe {
        let base = wide.add(before);
        if before > 0 {
            libc::munmap(wide.as_ptr().cast(), before);
        }
        libc::munmap(base.add(bytes).as_ptr().cast(), HUGE_PAGE - before);
        Ok(base)
    }
}

/// Asks for transparent huge pages, or for none. Returns what the memory will be.
///
/// # Safety
/// The range is mapped.
pub(super) unsafe fn advise(base: NonNull<u8>, bytes: usize, huge_pages: HugePages) -> MemoryKind {
    let huge = huge_pages != HugePages::Never && bytes >= HUGE_PAGE && transparent_huge_pages();
    let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
    // SAFETY: the caller's promise; advice changes no byte.
    let advised = unsafe { libc::madvise(base.as_ptr().cast(), bytes, advice) } == 0;
    if huge && advised { MemoryKind::TransparentHuge } else { MemoryKind::Plain }
}

/// Whether `madvise` can have an effect: the kernel takes the advice even where it is set to ignore it.
pub(super) fn transparent_huge_pages() -> bool {
    let mode = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    mode.is_ok_and(|m| !m.contains("[never]"))
}

/// Puts memory behind a range, in one call for many pages, which saves the trap of a page fault each. Linux 5.14.
///
/// # Safety
/// The range is mapped writable, and begins at a multiple of 4 KiB.
pub(super) unsafe fn populate(start: NonNull<u8>, bytes: usize) -> io::Result<()> {
    // SAFETY: the caller's promise; it changes no byte.
    match unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_POPULATE_WRITE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the kernel knows [`populate`].
pub(super) fn can_populate() -> bool {
    // SAFETY: advice about no byte.
    unsafe { libc::madvise(ptr::null_mut(), 0, libc::MADV_POPULATE_WRITE) == 0 }
}

/// Puts memory behind a range, or poison into it.
///
/// # Safety
/// The range is mapped writable, begins and ends at multiples of 4 KiB, and nobody else uses it.
pub(super) unsafe fn touch(start: NonNull<u8>, bytes: usize, poison: bool) {
    // SAFETY: the caller's promise, for all three.
    unsafe {
        if poison {
            return start.write_bytes(POISON, bytes);
        }
        if populate(start, bytes).is_ok() {
            return;
        }
        // An older kernel: faults do it.
        for offset in (0..bytes).step_by(SYSTEM_PAGE) {
            start.add(offset).write_volatile(0);
        }
    }
}

/// Binds a mapping that has not been touched to a NUMA node.
pub(super) fn bind(mapping: &Mapping, node: Option<usize>) -> Placement {
    let Some(node) = node else { return Placement::Anywhere("no node was asked for".into()) };
    let nodes = online_nodes();
    if nodes.len() < 2 {
        let why = if nodes.is_empty() { "the kernel has no NUMA" } else { "the machine has one NUMA node" };
        return Placement::Anywhere(why.into());
    }
    match mbind(mapping.base, mapping.bytes, node) {
        Ok(()) => Placement::Node(node),
        Err(e) => Placement::Anywhere(format!("mbind to node {node}: {e}").into()),
    }
}

/// Prefers `node` for the pages of a mapped range. Not MPOL_BIND: when the node is full, that kills the process where this
/// takes slower memory.
pub(super) fn mbind(base: NonNull<u8>, bytes: usize, node: usize) -> io::Result<()> {
    const MPOL_PREFERRED: usize = 1;
    const MAX_NODES: usize = 1024; // the kernel's largest
    let mut mask = [0u64; MAX_NODES / 64];
    let out_of_range = || io::Error::from_raw_os_error(libc::EINVAL);
    *mask.get_mut(node / 64).ok_or_else(out_of_range)? |= 1 << (node % 64);
    let bits = MAX_NODES + 1; // the kernel reads one bit less
    // SAFETY: a policy for a range that this arena has mapped; `mask` has MAX_NODES bits.
    match unsafe { libc::syscall(libc::SYS_mbind, base.as_ptr(), bytes, MPOL_PREFERRED, mask.as_ptr(), bits, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// NUMA nodes with memory or cores; none without NUMA.
pub(super) fn online_nodes() -> Vec<usize> {
    std::fs::read_to_string("/sys/devices/system/node/online").map_or(Vec::new(), |list| parse_list(list.trim()))
}

/// The kernel's lists: `0-3,8`.
pub(super) fn parse_list(list: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<usize>().ok()?..=last.parse().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}
