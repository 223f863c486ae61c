//! Faults on order: a countdown that makes the n-th page lease or copy fail, or interrupts at the n-th opportunity, for
//! tests that sweep n. (Pins are hooks of the caller's, so a test brings one that fails.)

use std::sync::atomic::{AtomicI64, Ordering};

/// What can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Pages are promised to a sequence.
    Lease,
    /// Device memory is allocated that was granted.
    Buffer,
    /// A copy between host and device, or the gather before it.
    Copy,
    /// The thread of a copy, or of the gather before it, panics.
    Worker,
    /// No failure: the interrupt flag is raised just before the engine looks at it.
    Interrupt,
}

/// Counts operations of one kind and fails one of them.
#[derive(Debug)]
pub struct Faults {
    kind: Fault,
    /// Operations that still succeed; below 0 all do again.
    left: AtomicI64,
}

impl Faults {
    /// The operation of this kind with number `index` (from 0) fails, and no other.
    pub fn at(kind: Fault, index: u32) -> Faults {
        Faults { kind, left: AtomicI64::new(index.into()) }
    }

    /// Whether the operation that has just come fails.
    pub fn strikes(&self, kind: Fault) -> bool {
        kind == self.kind && self.left.fetch_sub(1, Ordering::Relaxed) == 0
    }

    /// Operations that come before the one that fails; below 0 if it has.
    pub fn left(&self) -> i64 {
        self.left.load(Ordering::Relaxed)
    }

    /// Whether the fault has happened: a sweep ends where it did not.
    pub fn has_struck(&self) -> bool {
        self.left() < 0
    }
}
