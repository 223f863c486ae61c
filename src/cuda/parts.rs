//! Parts of a block of memory.

/// The parts of a block of memory, one after the other at multiples of 256 bytes.
#[derive(Default)]
pub(super) struct Parts(usize);

impl Parts {
    pub(super) fn next(&mut self, bytes: usize) -> usize {
        let at = self.0;
        self.0 = (at + bytes).next_multiple_of(256);
        at
    }

    pub(super) fn bytes(&self) -> usize {
        self.0
    }
}
