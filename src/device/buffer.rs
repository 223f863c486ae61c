//! Metered memory of the device, aligned to a cache line.
#![allow(unsafe_code)] // Copies on a GPU's queue.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::{Pod, Zeroable};

use super::cuda::{Gpu, GpuMemory};
use super::order::StreamId;
use crate::error::{Error, Result};

/// Counts the bytes of one memory against a budget, and apart what they are for. Cheap to clone; clones count together.
#[derive(Clone, Debug)]
pub struct Meter {
    counts: Arc<Counts>,
    /// What bytes that are taken through this clone are for.
    kind: Kind,
}

/// What memory is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// What passes work in.
    #[default]
    Workspace,
    /// Caches of sequences, and what a prefill needs beside them.
    Kv,
    /// The model's matrices.
    Weights,
}

#[derive(Debug)]
struct Counts {
    memory: &'static str,
    budget: u64,
    used: AtomicU64,
    peak: AtomicU64,
    /// Of `used`, by [`Kind`].
    by_kind: [AtomicU64; 3],
}

impl Meter {
    /// A meter for `memory` ("device" or "host"); no budget counts only.
    pub fn new(memory: &'static str, budget: Option<u64>) -> Meter {
        let (used, peak, by_kind) = (AtomicU64::new(0), AtomicU64::new(0), Default::default());
        let counts = Counts { memory, budget: budget.unwrap_or(u64::MAX), used, peak, by_kind };
        Meter { counts: Arc::new(counts), kind: Kind::default() }
    }

    /// The same meter for bytes of one kind.
    pub fn of(&self, kind: Kind) -> Meter {
        Meter { kind, ..self.clone() }
    }

    /// Bytes of one kind that are held now.
    pub fn used_for(&self, kind: Kind) -> u64 {
        self.counts.by_kind[kind as usize].load(Ordering::Relaxed)
    }

    /// The most bytes that may be held; `u64::MAX`: no budget.
    pub fn budget(&self) -> u64 {
        self.counts.budget
    }

    /// Bytes held now.
    pub fn used(&self) -> u64 {
        self.counts.used.load(Ordering::Relaxed)
    }

    /// The most bytes that were ever held at once.
    pub fn peak(&self) -> u64 {
        self.counts.peak.load(Ordering::Relaxed)
    }

    /// Bytes that may still be taken.
    pub fn available(&self) -> u64 {
        self.counts.budget.saturating_sub(self.used())
    }

    /// Takes `bytes` from the budget.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] naming `what`, the bytes needed and the bytes available; nothing is taken then.
    pub fn take(&self, bytes: u64, what: &str) -> Result<()> {
        let add = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= self.counts.budget);
        match self.counts.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add) {
            Ok(before) => {
                self.counts.peak.fetch_max(before + bytes, Ordering::Relaxed);
                self.counts.by_kind[self.kind as usize].fetch_add(bytes, Ordering::Relaxed);
                Ok(())
            }
            Err(used) => Err(self.refusal(bytes, self.counts.budget - used, what)),
        }
    }

    /// Sets `bytes` aside, so that what is allocated from them cannot be refused: admission of a request before it
    /// starts.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] as [`Meter::take`].
    pub fn grant(&self, bytes: u64, what: &str) -> Result<Grant> {
        self.take(bytes, what)?;
        Ok(Grant { meter: self.clone(), left: bytes })
    }

    /// The budget has only `available` bytes.
    pub(crate) fn refusal(&self, needed: u64, available: u64, what: &str) -> Error {
        let (memory, fix) = match (self.counts.budget, self.counts.memory) {
            (u64::MAX, _) => ("system", "free memory or shorten the context"),
            (_, "device") => ("device", "raise --vram-budget or shorten the context"),
            (_, memory) => (memory, "raise --host-kv-budget or shorten the context"),
        };
        Error::OutOfMemory { memory, what: what.to_string(), needed, available, fix: fix.into() }
    }

    /// The system has no `needed` bytes for `what`, though the budget has.
    pub(crate) fn system_refusal(&self, needed: u64, what: &str) -> Error {
        let fix = "the budget has room, but the system refused; free memory, or raise the system's limits: `ulimit -v`, \
                   vm.overcommit_memory, the memory limit of the container or control group";
        Error::OutOfMemory { memory: "system", what: what.to_string(), needed, available: 0, fix: fix.into() }
    }

    pub(crate) fn give_back(&self, bytes: u64) {
        self.counts.by_kind[self.kind as usize].fetch_sub(bytes, Ordering::Relaxed);
        self.counts.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Bytes of a budget that are set aside. What nobody drew goes back when it is dropped.
pub struct Grant {
    meter: Meter,
    left: u64,
}

impl Grant {
    /// The system has no `bytes` bytes for `what`, though they were granted.
    pub(super) fn system_refusal(&self, bytes: u64, what: &str) -> Error {
        self.meter.system_refusal(bytes, what)
    }

    /// Draws bytes, from the budget itself where the grant falls short.
    fn draw(&mut self, bytes: u64, what: &str) -> Result<()> {
        self.meter.take(bytes.saturating_sub(self.left), what)?;
        self.left = self.left.saturating_sub(bytes);
        Ok(())
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.meter.give_back(self.left);
    }
}

/// One cache line; the unit that keeps a buffer aligned for 64-byte vectors.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

impl Default for Line {
    fn default() -> Line {
        Line([0; 64])
    }
}

/// A byte range in metered device memory, aligned to 64 bytes. On the CPU device it is read and written as numbers through
/// [`Buffer::as_slice`]; on a GPU kernels know its address.
pub struct Buffer {
    memory: Memory,
    len: usize,
    meter: Meter,
    id: u64,
}

enum Memory {
    Cpu(Vec<Line>),
    Gpu(GpuMemory, Arc<Gpu>),
}

/// A number that nothing else has or will have.
pub(crate) fn unique_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Buffer {
    pub(super) fn new(
        len: usize,
        grant: &mut Grant,
        gpu: Option<&Arc<Gpu>>,
        poison: bool,
        what: &str,
    ) -> Result<Buffer> {
        let n_lines = len.div_ceil(64);
        let bytes = n_lines as u64 * 64;
        grant.draw(bytes, what)?;
        // 0xFF in every byte is NaN as f32, fp16 and bf16, and an absurd position as u32.
        let filling = if poison { 0xFF } else { 0 };
        let memory = match gpu {
            None => Memory::lines(n_lines, filling).ok_or_else(|| grant.system_refusal(bytes, what)),
            Some(gpu) => GpuMemory::new(gpu.driver(), bytes as usize, what).map(|m| Memory::Gpu(m, gpu.clone())),
        };
        let memory = memory.inspect_err(|_| grant.meter.give_back(bytes))?;
        let mut buffer = Buffer { memory, len, meter: grant.meter.clone(), id: unique_id() };
        if let Some(gpu) = gpu {
            buffer.fill(filling);
            gpu.driver().sound()?;
        }
        Ok(buffer)
    }

    /// Its number: no other buffer has it, before or after.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that the meter counts for it: whole cache lines.
    pub fn metered_bytes(&self) -> u64 {
        self.len.div_ceil(64) as u64 * 64
    }

    /// All bytes, on the CPU device.
    ///
    /// # Panics
    /// On a GPU.
    pub fn bytes(&self) -> &[u8] {
        match &self.memory {
            Memory::Cpu(lines) => &bytemuck::cast_slice(lines)[..self.len],
            Memory::Gpu(..) => panic!("a GPU's memory is not read by the CPU"),
        }
    }

    /// All bytes, to write, on the CPU device.
    ///
    /// # Panics
    /// On a GPU.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Cpu(lines) => &mut bytemuck::cast_slice_mut(lines)[..self.len],
            Memory::Gpu(..) => panic!("a GPU's memory is not written by the CPU"),
        }
    }

    /// The bytes as numbers. As [`Buffer::bytes`].
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(self.bytes())
    }

    /// The bytes as numbers, to write. As [`Buffer::bytes_mut`].
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    /// Where it is in a GPU's memory; 0 if it is empty.
    ///
    /// # Panics
    /// On the CPU device.
    pub(crate) fn address(&self) -> u64 {
        match &self.memory {
            Memory::Gpu(memory, _) => memory.address(),
            Memory::Cpu(_) => panic!("the CPU's memory has no address on a GPU"),
        }
    }

    /// Copies bytes `range` of `from` to byte `at` of this, in the order of the compute stream.
    pub(crate) fn copy(&mut self, at: usize, from: &Buffer, range: Range<usize>) {
        assert!(range.end <= from.len && at + range.len() <= self.len, "a copy within both buffers");
        match (&mut self.memory, &from.memory) {
            (Memory::Cpu(_), Memory::Cpu(_)) => {
                self.bytes_mut()[at..at + range.len()].copy_from_slice(&from.bytes()[range]);
            }
            (Memory::Gpu(to, gpu), Memory::Gpu(from, _)) => {
                let (to, from) = (to.address() + at as u64, from.address() + range.start as u64);
                // SAFETY: within both, as was just checked; both wait for the compute stream before they are freed.
                unsafe { gpu.queues().copy(StreamId::Compute, to, from, range.len()) };
            }
            _ => panic!("buffers of two devices"),
        }
    }

    /// Fills it with one byte, in the order of the compute stream.
    pub(crate) fn fill(&mut self, byte: u8) {
        match &mut self.memory {
            Memory::Cpu(_) => self.bytes_mut().fill(byte),
            // SAFETY: all of it is allocated, and waits for the compute stream before it is freed.
            Memory::Gpu(memory, gpu) => unsafe {
                gpu.driver().enter();
                gpu.queues().fill(StreamId::Compute, memory.address(), byte, memory.len());
            },
        }
    }

    /// Writes `from` at byte `at`, and waits until it is there: for what is set up once.
    pub(crate) fn write(&mut self, at: usize, from: &[u8]) {
        assert!(at + from.len() <= self.len, "a write within the buffer");
        match &self.memory {
            Memory::Cpu(_) => self.bytes_mut()[at..at + from.len()].copy_from_slice(from),
            Memory::Gpu(memory, gpu) => gpu.put(memory.address() + at as u64, from),
        }
    }

    /// Reads the bytes from `at` on into `to`, behind everything that the compute stream has been given.
    pub(crate) fn read(&self, at: usize, to: &mut [u8]) {
        assert!(at + to.len() <= self.len, "a read within the buffer");
        match &self.memory {
            Memory::Cpu(_) => to.copy_from_slice(&self.bytes()[at..at + to.len()]),
            Memory::Gpu(memory, gpu) => gpu.get(to, memory.address() + at as u64),
        }
    }
}

impl Memory {
    /// `None` if the system refuses.
    fn lines(n: usize, filling: u8) -> Option<Memory> {
        let mut lines = Vec::new();
        lines.try_reserve_exact(n).ok()?;
        lines.resize(n, Line([filling; 64]));
        Some(Memory::Cpu(lines))
    }
}

impl Drop for Buffer {
    /// On a GPU this waits for the compute stream, which may still read or write it (as freeing memory does there anyway).
    /// What the other streams do with it, its owner waits for.
    fn drop(&mut self) {
        if let Memory::Gpu(memory, gpu) = &self.memory
            && memory.len() > 0
        {
            gpu.driver().enter();
            gpu.queues().drain(StreamId::Compute);
        }
        self.meter.give_back(self.metered_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budget_is_hard_and_drop_gives_back() {
        let meter = Meter::new("device", Some(256));
        let alloc = |len, what| Buffer::new(len, &mut meter.grant(0, what)?, None, false, what);
        let a = alloc(100, "a").unwrap();
        assert_eq!((meter.used(), a.metered_bytes(), a.len()), (128, 128, 100));
        let refused = alloc(129, "the second").err().unwrap();
        assert_eq!(refused.exit_code(), 4);
        let text = refused.to_string();
        assert!(text.contains("the second") && text.contains("192") && text.contains("128"), "{text}");
        assert_eq!(meter.used(), 128, "a refusal takes nothing");
        drop(a);
        assert_eq!((meter.used(), meter.peak()), (0, 128));
    }

    /// The knob is then not a budget, whatever memory it is and whether there is a budget or none.
    #[test]
    fn what_the_system_refuses_is_not_blamed_on_a_budget() {
        for (memory, budget) in [("device", Some(u64::MAX - 1)), ("device", None), ("host", Some(u64::MAX - 1))] {
            let meter = Meter::new(memory, budget);
            let len = 1 << 60;
            let refused = Buffer::new(len, &mut meter.grant(0, "all").unwrap(), None, false, "all").err().unwrap();
            let text = refused.to_string();
            assert!(text.contains("ulimit -v") && text.contains("control group"), "{text}");
            assert!(text.contains("system memory") && !text.contains("budget or"), "{text}");
            assert_eq!((refused.exit_code(), meter.used()), (4, 0));
        }
    }

    #[test]
    fn a_grant_cannot_be_taken_away() {
        let meter = Meter::new("device", Some(256));
        let mut grant = meter.grant(192, "a request").unwrap();
        assert_eq!(meter.available(), 64);
        assert!(meter.grant(65, "another").is_err());
        let a = Buffer::new(128, &mut grant, None, false, "a").unwrap();
        assert_eq!(meter.available(), 64, "drawn from what was set aside");
        let b = Buffer::new(128, &mut grant, None, false, "more than is left of it").unwrap();
        assert_eq!(meter.available(), 0);
        drop(grant);
        assert_eq!(meter.available(), 0);
        drop((a, b));
        assert_eq!(meter.used(), 0);
        drop(meter.grant(100, "not drawn").unwrap());
        assert_eq!(meter.used(), 0);
    }

    #[test]
    fn poison_reads_as_nan() {
        let meter = Meter::new("device", None);
        let b = Buffer::new(64, &mut meter.grant(0, "b").unwrap(), None, true, "b").unwrap();
        assert!(b.as_slice::<f32>().iter().all(|x| x.is_nan()));
        assert!(b.as_slice::<u16>().iter().all(|&x| half::bf16::from_bits(x).is_nan()));
        assert_eq!(b.bytes().as_ptr() as usize % 64, 0);
    }
}
