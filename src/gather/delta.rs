//! Delta prefetch: which pairs of a new selection are in the slots already, and where the others go.
//!
//! A KV head has k slots and a table of the position that each holds. Consecutive selections overlap, so a pair that is
//! selected again stays where it is and only the misses are copied. Attention does not mind the order of the slots.
//! Pure logic; nothing is allocated once a plan of k slots has been made.

/// In a table: the slot holds no pair.
pub const EMPTY: u32 = u32::MAX;

/// A pair that has to be fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    /// Where it goes.
    pub slot: u32,
    /// Which token it is.
    pub position: u32,
}

/// The plan of one KV head, and its scratch space.
#[derive(Debug, Default)]
pub struct Delta {
    misses: Vec<Miss>,
    /// Per position of the selection: whether a slot holds it.
    held: Vec<bool>,
    /// Slots that a miss may take, ascending.
    freed: Vec<u32>,
}

impl Delta {
    /// A planner for up to `top_k` slots; more are possible and allocate once.
    pub fn new(top_k: usize) -> Delta {
        let (misses, held, freed) = (Vec::with_capacity(top_k), Vec::with_capacity(top_k), Vec::with_capacity(top_k));
        Delta { misses, held, freed }
    }

    /// Makes room for plans of `top_k` slots.
    pub fn reserve(&mut self, top_k: usize) {
        self.misses.reserve(top_k.saturating_sub(self.misses.len()));
        self.held.reserve(top_k.saturating_sub(self.held.len()));
        self.freed.reserve(top_k.saturating_sub(self.freed.len()));
    }

    /// Brings `table` to `selection`, whose positions ascend strictly, and returns what has to be fetched, ascending in
    /// slots and in positions.
    ///
    /// Afterwards the first `selection.len()` slots hold exactly the selection and the rest are [`EMPTY`], so that a
    /// reader needs the count alone; `slot_of` says for each position of the selection which slot that is. Of the pairs in those first slots, the ones that are selected stay where they are;
    /// a pair beyond them (the selection has shrunk) counts as not held.
    ///
    /// # Panics
    /// If the selection has more positions than there are slots, or `slot_of` has not as many as it.
    pub fn plan(&mut self, table: &mut [u32], selection: &[u32], slot_of: &mut [u32]) -> &[Miss] {
        assert!(selection.len() <= table.len(), "{} pairs for {} slots", selection.len(), table.len());
        assert_eq!(selection.len(), slot_of.len(), "a slot for each position");
        debug_assert!(selection.windows(2).all(|w| w[0] < w[1]), "a selection ascends");
        debug_assert!(selection.last().is_none_or(|&last| last != EMPTY), "{EMPTY} stands for no position");
        let (table, beyond) = table.split_at_mut(selection.len());
        beyond.fill(EMPTY);
        self.find_held(table, selection, slot_of);
        self.place_misses(table, selection, slot_of);
        &self.misses
    }

    /// Marks what is held, and lists the slots that are not of use.
    fn find_held(&mut self, table: &[u32], selection: &[u32], slot_of: &mut [u32]) {
        self.held.clear();
        self.held.resize(selection.len(), false);
        self.freed.clear();
        self.freed.resize(selection.len(), 0);
        let mut n_freed = 0;
        // No branch on whether a pair is held: a third of them are not, which cannot be predicted.
        for (slot, position) in (0..).zip(table) {
            let i = selection.partition_point(|p| p < position).min(selection.len() - 1);
            // In a table with a duplicate, the second is of no use.
            let hit = (selection[i] == *position) & !self.held[i];
            self.held[i] |= hit;
            slot_of[i] = if hit { slot } else { slot_of[i] };
            self.freed[n_freed] = slot;
            n_freed += usize::from(!hit);
        }
        self.freed.truncate(n_freed);
    }

    /// As many slots are freed as positions are missing, as table and selection are equally long.
    fn place_misses(&mut self, table: &mut [u32], selection: &[u32], slot_of: &mut [u32]) {
        self.misses.clear();
        let missing = selection.iter().zip(&self.held).zip(slot_of).filter(|((_, held), _)| !**held);
        for (((&position, _), slot_of), &slot) in missing.zip(&self.freed) {
            table[slot as usize] = position;
            *slot_of = slot;
            self.misses.push(Miss { slot, position });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// A table of k slots as some history leaves it: distinct positions in any order, empty slots anywhere.
    fn table() -> impl Strategy<Value = Vec<u32>> {
        (0..80usize, any::<u64>()).prop_flat_map(|(k, _)| {
            proptest::collection::btree_set(0..200u32, 0..=k).prop_flat_map(move |held| {
                let mut table: Vec<u32> = held.into_iter().collect();
                table.resize(k, EMPTY);
                Just(table).prop_shuffle()
            })
        })
    }

    fn table_and_selection() -> impl Strategy<Value = (Vec<u32>, Vec<u32>)> {
        table().prop_flat_map(|table| {
            let k = table.len();
            (Just(table), proptest::collection::btree_set(0..200u32, 0..=k).prop_map(Vec::from_iter))
        })
    }

    proptest! {
        #[test]
        fn slots_hold_the_selection_and_hits_do_not_move((before, selection) in table_and_selection()) {
            let mut delta = Delta::new(0);
            let mut after = before.clone();
            let n = selection.len();
            let mut slot_of = vec![EMPTY; n];
            let misses = delta.plan(&mut after, &selection, &mut slot_of).to_vec();
            prop_assert!(selection.iter().zip(&slot_of).all(|(&p, &slot)| after[slot as usize] == p));

            prop_assert_eq!(after[..n].iter().copied().collect::<BTreeSet<_>>(), BTreeSet::from_iter(selection.clone()));
            prop_assert!(after[n..].iter().all(|&p| p == EMPTY));

            let wanted = BTreeSet::from_iter(selection);
            for slot in (0..n).filter(|&slot| wanted.contains(&before[slot])) {
                prop_assert_eq!(before[slot], after[slot]);
            }
            let held = before[..n].iter().copied().collect::<BTreeSet<_>>();
            let missed: Vec<u32> = misses.iter().map(|m| m.position).collect();
            prop_assert_eq!(missed, wanted.difference(&held).copied().collect::<Vec<_>>());
            prop_assert!(misses.windows(2).all(|w| w[0].slot < w[1].slot));
            prop_assert!(misses.iter().all(|m| after[m.slot as usize] == m.position));

            let (mut again, wanted) = (before, Vec::from_iter(wanted));
            prop_assert_eq!(delta.plan(&mut again, &wanted, &mut slot_of), &misses[..]);
            prop_assert_eq!(&again, &after);
            prop_assert!(delta.plan(&mut again, &wanted, &mut slot_of).is_empty());
        }
    }

    /// The life of a head: it fills up, drifts, is truncated and fills again.
    #[test]
    fn a_head_over_time() {
        let mut delta = Delta::new(4);
        let mut table = [EMPTY; 4];
        let mut plan = |table: &mut [u32; 4], selection: &[u32]| {
            delta.plan(table, selection, &mut vec![EMPTY; selection.len()]).to_vec()
        };
        let miss = |slot, position| Miss { slot, position };
        assert_eq!(plan(&mut table, &[7, 9]), [miss(0, 7), miss(1, 9)]);
        assert_eq!(plan(&mut table, &[3, 7, 9, 12]), [miss(2, 3), miss(3, 12)]);
        assert_eq!(plan(&mut table, &[3, 5, 9, 12]), [miss(0, 5)]);
        assert_eq!(table, [5, 9, 3, 12]);
        // 12 lies beyond the first two slots and has to come again.
        assert_eq!(plan(&mut table, &[9, 12]), [miss(0, 12)]);
        assert_eq!(table, [12, 9, EMPTY, EMPTY]);
        assert_eq!(plan(&mut table, &[]), []);
        assert_eq!(table, [EMPTY; 4]);
    }

    #[test]
    #[should_panic(expected = "3 pairs for 2 slots")]
    fn more_than_fits() {
        Delta::new(2).plan(&mut [EMPTY; 2], &[1, 2, 3], &mut [EMPTY; 3]);
    }
}
