//! Which tokens are where: the two boundaries of a sequence's cache (method.md, "The cache of one sequence").

use super::options::{KvMode, KvOptions, PAGE};

/// Counts of one sequence. Always `nq <= no <= n`, and `nq`, `no` are multiples of [`PAGE`].
///
/// ```text
/// 0 ............ nq | nq ..... no | no ......... n |
/// read low-bit      | read at 16 bits              |
/// on the host, complete           | device only    |
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Tokens in the cache.
    pub n: usize,
    /// Tokens that are offloaded: packed on the device and complete on the host.
    pub no: usize,
    /// Tokens that attention reads low-bit. Lags `no` by one step, so that a page has been a candidate of one selection
    /// before it is read low-bit.
    pub nq: usize,
    /// Tokens that stay at 16 bits, R; `usize::MAX` where nothing is ever offloaded.
    residual_len: usize,
}

impl Counters {
    /// An empty cache.
    pub fn new(options: &KvOptions) -> Counters {
        let residual_len = if options.mode == KvMode::Full { usize::MAX } else { options.residual_len };
        Counters { n: 0, no: 0, nq: 0, residual_len }
    }

    /// Offloaded tokens after a prefill that ends with `n` tokens: `floor((n - R) / P) * P`, never fewer than before.
    pub fn offloaded_after_prefill(&self, n: usize) -> usize {
        (n.saturating_sub(self.residual_len) / PAGE * PAGE).max(self.no)
    }

    /// The state after a prefill that ends with `n` tokens.
    pub fn after_prefill(&mut self, n: usize) {
        *self = Counters { n, no: self.offloaded_after_prefill(n), nq: self.offloaded_after_prefill(n), ..*self };
    }

    /// The end of a decode step, in the method's order. Returns the page that counts as offloaded from now on, if any.
    pub fn advance(&mut self) -> Option<usize> {
        self.nq = self.no;
        self.n += 1;
        if self.n - self.no < self.residual_len.saturating_add(PAGE) {
            return None;
        }
        self.no += PAGE;
        Some(self.no / PAGE - 1)
    }

    /// The most wide pages that a layer's tail holds: `[nq, n + 1]` is at most `R + P + 2` tokens (the step after an
    /// offload, with both rows), and `nq` is on a page border.
    pub fn tail_pages(&self, capacity: usize) -> usize {
        (capacity + 1).min(self.residual_len.saturating_add(PAGE + 2)).div_ceil(PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(residual_len: usize) -> Counters {
        Counters::new(&KvOptions { residual_len, ..KvOptions::default() })
    }

    #[test]
    fn prefill_follows_the_formula() {
        for (r, n, no) in [(64, 0, 0), (64, 64, 0), (64, 127, 0), (64, 128, 64), (64, 129, 64), (100, 300, 192)] {
            let mut c = counters(r);
            c.after_prefill(n);
            assert_eq!((c.n, c.no, c.nq), (n, no, no), "R = {r}, n = {n}");
        }
    }

    /// Every step: the boundaries are ordered and aligned, a page is offloaded exactly one step before it is read
    /// low-bit, and the tail fits into the pages that are set aside for it.
    #[test]
    fn decode_keeps_the_invariants() {
        for r in [32, 33, 63, 64, 65, 100, 128, 200] {
            for start in [1, 31, 64, 127, 128, 129, 191, 192, 300] {
                let mut c = counters(r);
                c.after_prefill(start);
                for _ in 0..400 {
                    let tail_pages = (c.n + 2).div_ceil(PAGE) - c.nq / PAGE;
                    assert!(tail_pages <= c.tail_pages(usize::MAX - 1), "R = {r}: {c:?}");
                    let before = c;
                    let page = c.advance();
                    assert_eq!(c.nq, before.no);
                    assert_eq!(page.is_some(), c.no == before.no + PAGE);
                    assert!(page.is_none_or(|p| p == before.no / PAGE));
                    assert!(c.nq <= c.no && c.no <= c.n && c.no.is_multiple_of(PAGE));
                    assert!(c.n - c.no >= r.min(c.n) && (c.no == 0 || c.n - c.no < r + PAGE), "R = {r}: {c:?}");
                }
            }
        }
    }

    #[test]
    fn full_never_offloads() {
        let mut c = Counters::new(&KvOptions { mode: KvMode::Full, ..KvOptions::default() });
        c.after_prefill(10_000);
        assert!((0..1000).all(|_| c.advance().is_none()));
        assert_eq!((c.n, c.no, c.nq, c.tail_pages(10_000)), (11_000, 0, 0, 157));
    }
}
