//! The 16-bit pairs that replace low-bit ones: which positions, and in which slots they lie.

use std::time::Duration;

use super::layout::KvShape;
use super::plan::metered;
use crate::device::order::Site;
use crate::device::{Buffer, Carried, Device, Grants, InFlight};
use crate::error::Result;
use crate::gather::delta::{Delta, EMPTY, Miss};

/// Each byte of [`EMPTY`].
const EMPTY_BYTE: u8 = 0xFF;

/// Prefetched pairs of one layer. Every KV head has the same number of them.
pub struct Slots {
    /// Pairs per KV head that are valid, at most `top_k`.
    pub count: usize,
    /// `[n_kv_heads, top_k]` u32, ascending within `count`.
    pub positions: Buffer,
    /// `[n_kv_heads, top_k]` u32: the slot in which the pair of each position lies.
    pub slot_of: Buffer,
    /// `[n_kv_heads, top_k]` pairs, K | V: one a slot.
    pub pairs: Buffer,
    /// `[n_kv_heads, top_k]` u32: the position that each slot holds, or [`EMPTY`].
    table: Buffer,
    /// On a GPU `[n_kv_heads, pages]` u64, a bit for each position that a slot holds; else empty.
    skip: Buffer,
    /// `count` and `positions` as [`Slots::keep`] found them.
    kept: (usize, Buffer),
    /// k, or as many as can be selected at all if that is less.
    pub top_k: usize,
}

impl Slots {
    /// Bytes that a device meters for the slots of a layer.
    pub fn bytes(shape: &KvShape, top_k: usize) -> u64 {
        let pairs = (shape.n_kv_heads as u64).saturating_mul(top_k as u64);
        metered(pairs.saturating_mul(4))
            .saturating_mul(4)
            .saturating_add(metered(pairs.saturating_mul(shape.pair_bytes() as u64)))
    }

    /// Empty slots, for positions in the first `pages` pages.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] if that is more than was granted.
    pub fn new(grants: &mut Grants, shape: &KvShape, top_k: usize, pages: usize) -> Result<Slots> {
        let n = shape.n_kv_heads * top_k;
        let mut numbers = || grants.device(n * 4, "the prefetched positions");
        let (positions, slot_of, mut table, kept) = (numbers()?, numbers()?, numbers()?, (0, numbers()?));
        table.fill(EMPTY_BYTE);
        let pairs = grants.device(n * shape.pair_bytes(), "the prefetched pairs")?;
        let skip_bytes = if grants.is_gpu() { shape.n_kv_heads * pages * 8 } else { 0 };
        let mut skip = grants.device(skip_bytes, "the positions that are not read low-bit")?;
        skip.fill(0);
        Ok(Slots { count: 0, positions, slot_of, pairs, table, skip, kept, top_k })
    }

    /// The same selection in slots that have room for it. A selection lies in the first slots, so what one side has
    /// beyond the other's room is empty or of no use.
    fn copy_to(&self, to: &mut Slots, shape: &KvShape) {
        to.count = self.count;
        let top_k = self.top_k.min(to.top_k);
        assert!(self.count <= top_k, "room for {top_k} pairs, {} are selected", self.count);
        for head in 0..shape.n_kv_heads {
            let copy = |from: &Buffer, to_buffer: &mut Buffer, bytes: usize| {
                let start = head * self.top_k * bytes;
                to_buffer.copy(head * to.top_k * bytes, from, start..start + top_k * bytes);
            };
            copy(&self.positions, &mut to.positions, 4);
            copy(&self.slot_of, &mut to.slot_of, 4);
            copy(&self.table, &mut to.table, 4);
            copy(&self.pairs, &mut to.pairs, shape.pair_bytes());
            let (old, new) = (self.skip.len() / shape.n_kv_heads, to.skip.len() / shape.n_kv_heads);
            to.skip.copy(head * new, &self.skip, head * old..(head + 1) * old);
        }
    }

    fn places(&self, shape: &KvShape) -> SlotPlaces {
        let Slots { table, pairs, skip, .. } = self;
        let skip_stride = skip.len() / 8 / shape.n_kv_heads;
        SlotPlaces { table: table.address(), pairs: pairs.address(), skip: skip.address(), skip_stride }
    }

    /// The selected positions of one KV head.
    pub fn selected(&self, head: usize) -> &[u32] {
        &self.positions.as_slice()[head * self.top_k..][..self.count]
    }

    /// Nothing is selected. Pairs that are there may still be of use to the next selection, unless they are to be
    /// forgotten: then what they were read from has changed.
    pub fn clear(&mut self, forget: bool) {
        self.count = 0;
        // A GPU's kernels read whatever the table holds.
        if forget || !self.skip.is_empty() {
            self.table.fill(EMPTY_BYTE);
            self.skip.fill(0);
        }
    }

    /// Nothing is read from the slots until the next selection.
    pub fn hide(&mut self) {
        self.count = 0;
    }

    /// Remembers the selection, which is about to be replaced by one that a step may have to give up.
    pub fn keep(&mut self) {
        self.kept.0 = self.count;
        self.kept.1.bytes_mut().copy_from_slice(self.positions.bytes());
    }

    /// On a GPU: `count` pairs per KV head are selected by a kernel, which knows the slots by [`Prefetch::places`].
    pub(crate) fn select_on_gpu(&mut self, count: usize) {
        self.count = count;
    }

    /// The selection of the last [`Slots::keep`] again. Its pairs have to be fetched as those of a new one have: all of
    /// them are on the host.
    pub fn restore(&mut self) {
        self.count = self.kept.0;
        self.positions.bytes_mut().copy_from_slice(self.kept.1.bytes());
    }

    /// Finds a slot for each selected pair of one KV head. `miss` hears of those that have to be fetched.
    pub(super) fn place(&mut self, head: usize, delta: &mut Delta, keep: bool, mut miss: impl FnMut(Miss)) {
        let (row, count) = (head * self.top_k..(head + 1) * self.top_k, self.count);
        let table = &mut self.table.as_mut_slice::<u32>()[row.clone()];
        if !keep {
            table.fill(EMPTY);
        }
        let selection = &self.positions.as_slice::<u32>()[row.clone()][..count];
        let slot_of = &mut self.slot_of.as_mut_slice::<u32>()[row][..count];
        delta.plan(table, selection, slot_of).iter().for_each(|&m| miss(m));
    }
}

/// The slots of one layer: at rest, or on their way.
pub struct Prefetch {
    slots: InFlight<Slots>,
    metered_bytes: u64,
    /// On a GPU: where the slots are, at rest or not.
    places: Option<SlotPlaces>,
}

/// Addresses of slots in a GPU's memory.
#[derive(Clone, Copy)]
pub(crate) struct SlotPlaces {
    /// Of the position that each slot holds.
    pub table: u64,
    /// Of the pairs.
    pub pairs: u64,
    /// Of the bits of positions that a slot holds.
    pub skip: u64,
    /// Words of those bits per KV head.
    pub skip_stride: usize,
}

impl Prefetch {
    /// Empty slots, with room for no pair yet.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] if that is more than was granted.
    pub fn new(grants: &mut Grants, shape: &KvShape) -> Result<Prefetch> {
        Ok(Prefetch { slots: InFlight::new(Slots::new(grants, shape, 0, 0)?), metered_bytes: 0, places: None })
    }

    /// Grows to room for `top_k` pairs per KV head, out of `pages` pages. A selection that is there stays.
    ///
    /// # Errors
    /// As [`Prefetch::new`].
    ///
    /// # Panics
    /// While a prefetch is under way.
    pub fn reserve(&mut self, grants: &mut Grants, shape: &KvShape, top_k: usize, pages: usize) -> Result<()> {
        let skip_bytes = if grants.is_gpu() { shape.n_kv_heads * pages * 8 } else { 0 };
        if self.slots().top_k >= top_k && self.slots().skip.len() >= skip_bytes {
            return Ok(());
        }
        let mut slots = Slots::new(grants, shape, top_k, pages)?;
        self.slots().copy_to(&mut slots, shape);
        self.metered_bytes = Slots::bytes(shape, top_k);
        self.places = grants.is_gpu().then(|| slots.places(shape));
        *self.slots.get_mut() = slots;
        Ok(())
    }

    /// The same selection as `from`, for a sequence that goes its own way from there.
    ///
    /// # Panics
    /// If there is less room, or while a prefetch is under way.
    pub fn copy_from(&mut self, from: &Prefetch, shape: &KvShape) {
        from.slots().copy_to(self.slots.get_mut(), shape);
    }

    /// Where the slots are on a GPU; `None` if there are none.
    pub(crate) fn places(&self) -> Option<SlotPlaces> {
        self.places
    }

    /// Device bytes that the slots take, wherever they are.
    pub fn metered_bytes(&self) -> u64 {
        self.metered_bytes
    }

    /// Waits for a prefetch that is under way; from here on [`Prefetch::slots`] holds its pairs. See
    /// [`InFlight::arrive`].
    pub fn arrive(
        &mut self,
        device: &Device,
        site: Option<Site>,
        exposed: &mut Duration,
    ) -> std::result::Result<(), String> {
        self.slots.arrive(device, site, exposed)
    }

    /// The pairs that have arrived.
    ///
    /// # Panics
    /// While a prefetch is under way: call [`Prefetch::arrive`] first.
    pub fn slots(&self) -> &Slots {
        self.slots.get()
    }

    /// The slots, to write a new selection into.
    ///
    /// # Panics
    /// As [`Prefetch::slots`].
    pub fn slots_mut(&mut self) -> &mut Slots {
        self.slots.get_mut()
    }

    /// The slots leave for a fetch.
    pub(super) fn send(&mut self) -> Carried<Slots> {
        self.slots.send()
    }
}
