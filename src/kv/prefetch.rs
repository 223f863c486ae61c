//! The 16-bit pairs that replace low-bit ones: which positions, and their way back from the host.

use std::sync::Arc;
use std::time::Duration;

use super::host::HostLayer;
use super::layout::KvShape;
use super::options::PAGE;
use crate::device::{Buffer, Device, Grants, InFlight};
use crate::error::Result;

/// Prefetched pairs of one layer. Every KV head has the same number of them.
pub struct Slots {
    /// Pairs per KV head that are valid, at most `top_k`.
    pub count: usize,
    /// `[n_kv_heads, top_k]` u32, ascending within `count`.
    pub positions: Buffer,
    /// `[n_kv_heads, top_k]` pairs, K | V.
    pub pairs: Buffer,
    /// k, or as many as can be selected at all if that is less.
    pub top_k: usize,
}

impl Slots {
    fn new(grants: &mut Grants, shape: &KvShape, top_k: usize) -> Result<Slots> {
        let n = shape.n_kv_heads * top_k;
        let positions = grants.device(n * 4, "the prefetched positions")?;
        let pairs = grants.device(n * shape.pair_bytes(), "the prefetched pairs")?;
        Ok(Slots { count: 0, positions, pairs, top_k })
    }

    /// The same selection in slots that have room for more.
    fn copy_to(&self, to: &mut Slots, shape: &KvShape) {
        to.count = self.count;
        for head in 0..shape.n_kv_heads {
            let (from_row, to_row) = (head * self.top_k, head * to.top_k);
            to.positions.as_mut_slice::<u32>()[to_row..][..self.count].copy_from_slice(self.selected(head));
            let pair = shape.pair_bytes();
            let from = &self.pairs.bytes()[from_row * pair..][..self.count * pair];
            to.pairs.bytes_mut()[to_row * pair..][..from.len()].copy_from_slice(from);
        }
    }

    /// The selected positions of one KV head.
    pub fn selected(&self, head: usize) -> &[u32] {
        &self.positions.as_slice()[head * self.top_k..][..self.count]
    }

    /// Bytes that a fetch of all pairs moves.
    pub fn fetch_bytes(&self, shape: &KvShape) -> u64 {
        (shape.n_kv_heads * self.count * shape.pair_bytes()) as u64
    }
}

/// The slots of one layer: at rest, or on their way.
pub struct Prefetch {
    // Exactly one of the two is there, but for the moment of a change.
    ready: Option<Slots>,
    in_flight: Option<InFlight<Slots>>,
    metered_bytes: u64,
}

impl Prefetch {
    /// Empty slots, with room for no pair yet.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] if that is more than was granted.
    pub fn new(grants: &mut Grants, shape: &KvShape) -> Result<Prefetch> {
        Ok(Prefetch { ready: Some(Slots::new(grants, shape, 0)?), in_flight: None, metered_bytes: 0 })
    }

    /// Grows to room for `top_k` pairs per KV head. A selection that is there stays.
    ///
    /// # Errors
    /// As [`Prefetch::new`].
    pub fn reserve(&mut self, grants: &mut Grants, shape: &KvShape, top_k: usize) -> Result<()> {
        self.arrive(&mut Duration::default());
        if self.slots().top_k >= top_k {
            return Ok(());
        }
        let mut slots = Slots::new(grants, shape, top_k)?;
        self.slots().copy_to(&mut slots, shape);
        self.metered_bytes = slots.positions.metered_bytes() + slots.pairs.metered_bytes();
        self.ready = Some(slots);
        Ok(())
    }

    /// Device bytes that the slots take, wherever they are.
    pub fn metered_bytes(&self) -> u64 {
        self.metered_bytes
    }

    /// Waits for a prefetch that is under way; from here on [`Prefetch::slots`] holds its pairs. Time that the caller
    /// spent waiting is added to `exposed`.
    pub fn arrive(&mut self, exposed: &mut Duration) {
        if let Some(in_flight) = self.in_flight.take() {
            self.ready = Some(in_flight.wait(exposed));
        }
    }

    /// The pairs that have arrived.
    ///
    /// # Panics
    /// While a prefetch is under way: call [`Prefetch::arrive`] first.
    pub fn slots(&self) -> &Slots {
        self.ready.as_ref().expect("no prefetch is under way")
    }

    /// The slots, to write a new selection into.
    ///
    /// # Panics
    /// As [`Prefetch::slots`].
    pub fn slots_mut(&mut self) -> &mut Slots {
        self.ready.as_mut().expect("no prefetch is under way")
    }

    /// Begins to gather the selected pairs from the host. Returns the bytes that this moves.
    pub fn begin(&mut self, device: &Device, host: &Arc<HostLayer>, shape: KvShape) -> u64 {
        let slots = self.ready.take().expect("no prefetch is under way");
        let bytes = slots.fetch_bytes(&shape);
        let host = host.clone();
        let gather = move |slots: &mut Slots| gather(slots, &host, &shape);
        self.in_flight = Some(device.copy_stream().launch(slots, gather));
        bytes
    }
}

/// Copies every selected pair from its host page into its slot.
fn gather(slots: &mut Slots, host: &HostLayer, shape: &KvShape) {
    let pages = host.pages();
    let Slots { count, positions, pairs, top_k } = slots;
    let pair_bytes = shape.pair_bytes();
    for head in 0..shape.n_kv_heads {
        let selected = &positions.as_slice::<u32>()[head * *top_k..][..*count];
        let to = pairs.bytes_mut()[head * *top_k * pair_bytes..].chunks_exact_mut(pair_bytes);
        for (&position, to) in selected.iter().zip(to) {
            let (page, token) = (position as usize / PAGE, position as usize % PAGE);
            to.copy_from_slice(&pages[page].bytes()[shape.pair(head, token)]);
        }
    }
}
