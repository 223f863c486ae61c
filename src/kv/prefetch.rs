//! The 16-bit pairs that replace low-bit ones: which positions, and their way back from the host.

use std::sync::Arc;
use std::time::Duration;

use super::host::HostLayer;
use super::layout::KvShape;
use super::options::PAGE;
use crate::device::{Buffer, Device, InFlight};
use crate::error::Result;

/// Prefetched pairs of one layer. Every KV head has the same number of them.
pub struct Slots {
    /// Pairs per KV head that are valid, at most `top_k`.
    pub count: usize,
    /// `[n_kv_heads, top_k]` u32, ascending within `count`.
    pub positions: Buffer,
    /// `[n_kv_heads, top_k]` pairs, K | V.
    pub pairs: Buffer,
    /// k.
    pub top_k: usize,
}

impl Slots {
    fn new(device: &Device, shape: &KvShape, top_k: usize) -> Result<Slots> {
        let n = shape.n_kv_heads * top_k;
        let positions = device.alloc(n * 4, "the prefetched positions")?;
        let pairs = device.alloc(n * shape.pair_bytes(), "the prefetched pairs")?;
        Ok(Slots { count: 0, positions, pairs, top_k })
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
    /// Empty slots for `top_k` pairs per KV head.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] when the device budget is used up.
    pub fn new(device: &Device, shape: &KvShape, top_k: usize) -> Result<Prefetch> {
        let slots = Slots::new(device, shape, top_k)?;
        let metered_bytes = slots.positions.metered_bytes() + slots.pairs.metered_bytes();
        Ok(Prefetch { ready: Some(slots), in_flight: None, metered_bytes })
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
