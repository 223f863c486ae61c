//! What a GPU's kernels know of one sequence's cache: where its pages lie, listed in the GPU's memory.
//!
//! ```text
//! [layer 0: wide pages | host pages][layer 1: wide pages | host pages] ...      u64 addresses, by position / 64
//! ```
//!
//! The host keeps the same lists in pinned memory and copies them over when a page is begun or offloaded, every 64 steps or
//! so. A copy reads them while the call that began it lasts, and they change only between calls, or layer by layer within
//! a prefill.

use std::sync::Arc;

use bytemuck::cast_slice_mut;

use crate::device::cuda::{Gpu, PinnedMemory};
use crate::device::order::StreamId;
use crate::device::{Buffer, Grants};
use crate::error::Result;

/// The lists of one sequence.
pub(crate) struct Tables {
    gpu: Arc<Gpu>,
    device: Buffer,
    host: PinnedMemory,
    /// Pages of a list.
    room: usize,
    outdated: bool,
}

/// Which list of a layer.
#[derive(Clone, Copy)]
pub(crate) enum List {
    /// Wide pages on the device.
    Wide = 0,
    /// Pages on the host.
    Host = 1,
}

impl Tables {
    /// Lists for `room` pages a layer, all of them unknown.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Device`].
    pub(crate) fn new(gpu: &Arc<Gpu>, grants: &mut Grants, n_layers: usize, room: usize) -> Result<Tables> {
        let bytes = n_layers * 2 * room * 8;
        let device = grants.device(bytes, "the lists of KV pages")?;
        let host = PinnedMemory::new(gpu.driver(), bytes)?;
        Ok(Tables { gpu: gpu.clone(), device, host, room, outdated: true })
    }

    /// The lists no longer say what is.
    pub(crate) fn outdate(&mut self) {
        self.outdated = true;
    }

    /// Whether they must be filled and sent again.
    pub(crate) fn is_outdated(&self) -> bool {
        self.outdated
    }

    /// The address of a list.
    pub(crate) fn address(&self, layer: usize, list: List) -> u64 {
        self.device.address() + self.start(layer, list) as u64
    }

    fn start(&self, layer: usize, list: List) -> usize {
        (layer * 2 + list as usize) * self.room * 8
    }

    /// A list, to fill.
    pub(crate) fn list_mut(&mut self, layer: usize, list: List) -> &mut [u64] {
        let (start, bytes) = (self.start(layer, list), self.room * 8);
        cast_slice_mut(&mut self.host.bytes_mut()[start..start + bytes])
    }

    /// Sends all lists, in the order of the compute stream.
    pub(crate) fn send(&mut self) {
        self.send_bytes(0, self.host.bytes().len());
        self.outdated = false;
    }

    /// Sends one list, in the order of the compute stream.
    pub(crate) fn send_list(&mut self, layer: usize, list: List) {
        self.send_bytes(self.start(layer, list), self.room * 8);
    }

    fn send_bytes(&self, start: usize, bytes: usize) {
        self.gpu.send(StreamId::Compute, self.device.address() + start as u64, &self.host, start..start + bytes);
    }
}
