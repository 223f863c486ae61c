//! Where the rows go: no two to the same slot, whatever the caller says, as several threads write them.

/// The way of one row, as far as it is fixed before the threads begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) slot: usize,
    /// Whose threads copy it: the index of a node in the topology.
    pub(crate) home: usize,
}

/// Scratch space for the ways of a gather.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    ways: Vec<Way>,
    /// One bit per slot; used only if the slots do not ascend.
    taken: Vec<u64>,
}

impl Slots {
    /// Allocates now what `n_rows` rows need.
    pub(crate) fn reserve(&mut self, n_rows: usize) {
        self.ways.reserve(n_rows.saturating_sub(self.ways.len()));
    }

    /// The ways of `n_rows` rows. The threads use these and do not ask again, as they might be answered otherwise.
    /// About 1 ns a row, where its copy takes 20 to 50.
    ///
    /// # Panics
    /// If a slot is not below `n_slots`, or is given twice.
    pub(crate) fn resolve(&mut self, n_rows: usize, n_slots: usize, way: impl Fn(usize) -> Way) -> &[Way] {
        self.ways.clear();
        // Selections ascend and so do the slots of a delta plan: one pass tells, and the bits are rarely needed.
        let (mut end, mut ascending) = (0, true);
        self.ways.extend((0..n_rows).map(|i| {
            let way = way(i);
            ascending &= way.slot >= end;
            end = end.max(way.slot.saturating_add(1));
            way
        }));
        assert!(end <= n_slots, "slot {} of a staging block of {n_slots}", end - 1);
        if !ascending {
            self.assert_distinct(n_slots);
        }
        &self.ways
    }

    fn assert_distinct(&mut self, n_slots: usize) {
        self.taken.clear();
        self.taken.resize(n_slots.div_ceil(64), 0);
        for Way { slot, .. } in self.ways.iter().copied() {
            let (word, bit) = (&mut self.taken[slot / 64], 1 << (slot % 64));
            assert!(*word & bit == 0, "two rows go to slot {slot}");
            *word |= bit;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(n_rows: usize, n_slots: usize, slot: impl Fn(usize) -> usize) -> Vec<usize> {
        let mut slots = Slots::default();
        let ways = slots.resolve(n_rows, n_slots, |i| Way { slot: slot(i), home: i });
        assert!(ways.iter().enumerate().all(|(i, way)| way.home == i));
        ways.iter().map(|way| way.slot).collect()
    }

    #[test]
    fn any_order_passes() {
        assert_eq!(resolve(0, 0, |_| unreachable!()), [0; 0]);
        assert_eq!(resolve(3, 130, |i| 64 * i), [0, 64, 128]);
        assert_eq!(resolve(3, 130, |i| 129 - 64 * i), [129, 65, 1]);
    }

    #[test]
    #[should_panic(expected = "two rows go to slot 0")]
    fn a_slot_twice() {
        resolve(4, 3, |i| i % 3);
    }

    #[test]
    #[should_panic(expected = "slot 3 of a staging block of 3")]
    fn beyond_the_block() {
        resolve(4, 3, |i| i);
    }
}
