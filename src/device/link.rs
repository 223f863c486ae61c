//! The CPU device's copy engine: the gather pool, and a link to "device memory" whose speed can be set, so that schedules
//! can be compared on a machine where both memories are the same.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fault::{Fault, Faults};
use super::trace::Trace;
use crate::gather::{Gather, NodeId, Rows, Staging, Stores};

/// How fast the link is to be.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinkOptions {
    /// Gigabytes per second, each way; `None`: as fast as memory copies.
    pub gbps: Option<f64>,
    /// Microseconds from the start of a copy to its first byte.
    pub latency_us: f64,
}

impl LinkOptions {
    fn takes(&self, bytes: u64) -> Duration {
        // Bytes per microsecond are thousands of gigabytes per second.
        let us = self.latency_us + self.gbps.map_or(0.0, |gbps| bytes as f64 / (gbps * 1e3));
        Duration::from_nanos((us * 1e3) as u64)
    }
}

/// What copies need of the device. Shared with the jobs on its streams, which must not hold the device itself.
pub struct CopyEngine {
    /// Gathers scattered rows.
    pub gather: Gather,
    link: LinkOptions,
    faults: Option<Arc<Faults>>,
    trace: Option<Arc<Trace>>,
}

impl CopyEngine {
    pub(super) fn new(
        gather: Gather,
        link: LinkOptions,
        faults: Option<Arc<Faults>>,
        trace: Option<Arc<Trace>>,
    ) -> CopyEngine {
        CopyEngine { gather, link, faults, trace }
    }

    /// As [`Gather::gather`], for a job of the gather stream: each node's part is in the trace, if there is one.
    ///
    /// # Panics
    /// As there.
    pub fn gather<'a, D: Fn(usize) -> usize>(
        &self,
        rows: &Rows<impl Fn(usize) -> &'a [u8] + Sync, impl Fn(usize) -> NodeId + Sync>,
        to: Staging<'_, D>,
        stores: Stores,
    ) {
        match &self.trace {
            Some(trace) => self.gather.gather_watched(rows, to, stores, Some(&|share| trace.add_share(share))),
            None => self.gather.gather(rows, to, stores),
        };
    }

    /// Does `copy`, which moves `bytes` bytes over the link, and takes as long as the link would. One thread a direction
    /// calls this, so the two directions do not share their bandwidth, as on PCIe.
    pub fn transfer(&self, bytes: u64, copy: impl FnOnce()) {
        let start = Instant::now();
        copy();
        pause_until(start + self.link.takes(bytes));
    }

    /// Whether the copy that has just come is to fail, in the words that its waiter hears.
    ///
    /// # Errors
    /// If a test has ordered that ([`Faults`]).
    ///
    /// # Panics
    /// As above.
    pub fn check(&self) -> Result<(), String> {
        let Some(faults) = &self.faults else { return Ok(()) };
        assert!(!faults.strikes(Fault::Worker), "a panic of a copy thread (fault injection)");
        if faults.strikes(Fault::Copy) { Err("the copy was made to fail (fault injection)".into()) } else { Ok(()) }
    }
}

/// Sleeps while that is precise enough (the kernel may add 50 us and more), then yields.
fn pause_until(end: Instant) {
    const COARSE: Duration = Duration::from_micros(150);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match left {
            Duration::ZERO => return,
            _ if left > COARSE => std::thread::sleep(left - COARSE),
            _ => std::thread::yield_now(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_takes_latency_and_bytes_over_bandwidth() {
        let link = LinkOptions { gbps: Some(2.0), latency_us: 10.0 };
        assert_eq!(link.takes(4000), Duration::from_micros(12));
        assert_eq!(LinkOptions::default().takes(1 << 30), Duration::ZERO);
    }

    #[test]
    fn pauses_are_not_too_short() {
        for us in [0, 50, 400] {
            let start = Instant::now();
            pause_until(start + Duration::from_micros(us));
            assert!(start.elapsed() >= Duration::from_micros(us));
        }
    }
}
