//! Happens-before checker: are any two conflicting uses of a resource left unordered?
//!
//! Every operation is enqueued on a stream and declares what it reads and writes; waiting for an event orders a stream
//! behind what another had been given when the event was recorded. The checker keeps a vector clock per stream (Lamport
//! 1978, Fidge 1988): operation `a` of stream `s` happens before `b` if `b`'s stream had seen `s` at least as far as `a`
//! when `b` was enqueued. Two uses of one resource, at least one of them a write, of which neither happens before the
//! other, are a conflict, whether or not they met at the time: on another machine they would.
//!
//! All threads that call into a device count as one compute stream: what two of them do at once is taken to be ordered.
//! They share no resource, as a session is `&mut` to whoever works on it; but for host pages, which go from one to the
//! next through the lock of their slab, and after the copies that used them.
//!
//! What is checked is the order that the waits promise, not the order that happened. So a wait can be taken out of the
//! promise ([`Checker::ignore`]) while the program keeps it, and the checker must then name the conflict that the wait
//! was there for.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

/// A queue whose operations run in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StreamId {
    /// Where the layers are computed.
    #[default]
    Compute,
    /// Host memory to staging blocks: scattered pairs on their way to the device.
    Gather,
    /// Host to device: prefetches and layers that come back.
    CopyIn,
    /// Device to host: pages that are offloaded.
    CopyOut,
}

impl StreamId {
    /// All streams, in the order of a clock's entries.
    pub const ALL: [StreamId; 4] = [StreamId::Compute, StreamId::Gather, StreamId::CopyIn, StreamId::CopyOut];

    /// The name in reports and traces.
    pub fn name(self) -> &'static str {
        match self {
            StreamId::Compute => "compute",
            StreamId::Gather => "gather",
            StreamId::CopyIn => "copy-in",
            StreamId::CopyOut => "copy-out",
        }
    }
}

/// Something that operations use as a whole: a page, the slots of a layer. Named by numbers that are never used again
/// ([`super::buffer::Buffer::id`]), where addresses are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Resource {
    /// A wide page in device memory, by its buffer.
    DevicePage(u64),
    /// A wide page in host memory: slab, page. Not named by who leases it, so that its next lease is checked against
    /// the last.
    HostPage(u64, usize),
    /// A packed page in device memory: buffer, page.
    PackedPage(u64, usize),
    /// The prefetched pairs of one layer of one sequence, by their buffer.
    Slots(u64),
    /// The positions that a selection wrote, by their buffer.
    Selection(u64),
    /// A block of pinned memory that is gathered into and copied from.
    Staging(u64),
}

/// What an operation uses.
#[derive(Default)]
pub struct Uses {
    /// Read, and not written.
    pub reads: Vec<Resource>,
    /// Written, whether read or not.
    pub writes: Vec<Resource>,
}

/// Position in a stream: entry `s` counts the operations of stream `s` that are known to be done.
type Clock = [u64; StreamId::ALL.len()];

/// What a stream had been given when an event was recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventClock(Clock);

/// The place of a wait in the program; a mutation test takes them out one by one.
pub type Site = &'static str;

/// An operation that used a resource.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use {
    /// What the operation is called.
    pub operation: &'static str,
    /// Model layer.
    pub layer: usize,
    /// Its stream.
    pub stream: StreamId,
    /// Its place in the stream, from 1.
    pub at: u64,
    /// Whether it writes.
    pub writes: bool,
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.writes { "writes" } else { "reads" };
        let Use { operation, layer, stream, at, .. } = self;
        write!(f, "{operation} of layer {layer} (number {at} on {}) {how}", stream.name())
    }
}

/// Two uses that nothing orders.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conflict {
    /// What both use.
    pub resource: Resource,
    /// The one that was enqueued first.
    pub earlier: Use,
    /// The one that was enqueued later.
    pub later: Use,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}; {}; nothing orders the two", self.resource, self.earlier, self.later)
    }
}

/// Uses of a resource that a later operation can still conflict with.
#[derive(Default)]
struct History {
    last_write: Option<Use>,
    /// The last read of each stream since that write.
    reads: [Option<Use>; StreamId::ALL.len()],
}

/// See the module.
#[derive(Default)]
pub struct Checker {
    clocks: [Clock; StreamId::ALL.len()],
    uses: HashMap<Resource, History>,
    conflicts: Vec<Conflict>,
    sites: BTreeSet<Site>,
    ignored: Option<Site>,
}

impl Checker {
    /// A checker that knows of nothing yet.
    pub fn new() -> Checker {
        Checker::default()
    }

    /// Acts as if the waits at this site were not there.
    pub fn ignore(&mut self, site: Site) {
        self.ignored = Some(site);
    }

    /// An operation is enqueued.
    pub fn operation(
        &mut self,
        stream: StreamId,
        name: &'static str,
        layer: usize,
        reads: impl IntoIterator<Item = Resource>,
        writes: impl IntoIterator<Item = Resource>,
    ) {
        let s = stream as usize;
        self.clocks[s][s] += 1;
        let at = self.clocks[s][s];
        let this = |writes| Use { operation: name, layer, stream, at, writes };
        for resource in reads {
            self.use_resource(resource, this(false));
        }
        for resource in writes {
            self.use_resource(resource, this(true));
        }
    }

    /// An event that stands for everything that `stream` has been given so far.
    pub fn record(&self, stream: StreamId) -> EventClock {
        EventClock(self.clocks[stream as usize])
    }

    /// What `stream` is given from now on comes after the event.
    pub fn wait(&mut self, stream: StreamId, event: EventClock, site: Site) {
        self.sites.insert(site);
        if self.ignored == Some(site) {
            return;
        }
        let clock = &mut self.clocks[stream as usize];
        clock.iter_mut().zip(event.0).for_each(|(ours, theirs)| *ours = theirs.max(*ours));
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        (0..StreamId::ALL.len()).map(|s| self.clocks[s][s]).sum()
    }

    /// All conflicts so far, in the order in which they were found.
    pub fn conflicts(&self) -> &[Conflict] {
        &self.conflicts
    }

    /// Every wait site that was passed, ignored or not.
    pub fn sites(&self) -> impl Iterator<Item = Site> {
        self.sites.iter().copied()
    }

    fn use_resource(&mut self, resource: Resource, this: Use) {
        let seen = self.clocks[this.stream as usize];
        let unordered = |earlier: &&Use| seen[earlier.stream as usize] < earlier.at;
        let history = self.uses.entry(resource).or_default();
        let readers = history.reads.iter().flatten().filter(|_| this.writes);
        for earlier in history.last_write.iter().chain(readers).filter(unordered) {
            self.conflicts.push(Conflict { resource, earlier: earlier.clone(), later: this.clone() });
        }
        if this.writes {
            *history = History { last_write: Some(this), reads: Default::default() };
        } else {
            let stream = this.stream as usize;
            history.reads[stream] = Some(this);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::StreamId::{Compute, CopyIn, CopyOut};
    use super::*;

    const PAGE: Resource = Resource::DevicePage(64);

    #[test]
    fn one_stream_orders_itself() {
        let mut c = Checker::new();
        c.operation(Compute, "write", 0, [], [PAGE]);
        c.operation(Compute, "read", 0, [PAGE], []);
        c.operation(Compute, "write again", 0, [], [PAGE]);
        assert_eq!(c.conflicts(), []);
    }

    #[test]
    fn an_unordered_read_and_write_are_named() {
        let mut c = Checker::new();
        c.operation(Compute, "append", 3, [], [PAGE]);
        c.operation(CopyOut, "page-out", 3, [PAGE], []);
        let text = c.conflicts()[0].to_string();
        assert_eq!(c.conflicts().len(), 1);
        assert!(text.contains("append of layer 3") && text.contains("page-out of layer 3"), "{text}");
    }

    #[test]
    fn an_event_orders() {
        let mut c = Checker::new();
        c.operation(Compute, "append", 0, [], [PAGE]);
        let appended = c.record(Compute);
        c.wait(CopyOut, appended, "page-out");
        c.operation(CopyOut, "page-out", 0, [PAGE], []);
        assert_eq!(c.conflicts(), []);
        // Reusing the page needs the way back too.
        c.operation(Compute, "append", 1, [], [PAGE]);
        assert_eq!(c.conflicts().len(), 1);
        assert_eq!(c.conflicts()[0].earlier.operation, "page-out");
    }

    #[test]
    fn an_event_covers_what_its_stream_had_seen() {
        let mut c = Checker::new();
        c.operation(Compute, "write", 0, [], [PAGE]);
        let written = c.record(Compute);
        c.wait(CopyIn, written, "a");
        let relayed = c.record(CopyIn);
        c.wait(CopyOut, relayed, "b");
        c.operation(CopyOut, "read", 0, [PAGE], []);
        assert_eq!(c.conflicts(), [], "order is transitive");
    }

    #[test]
    fn an_event_does_not_cover_what_came_later() {
        let mut c = Checker::new();
        let early = c.record(Compute);
        c.operation(Compute, "write", 0, [], [PAGE]);
        c.wait(CopyIn, early, "too early");
        c.operation(CopyIn, "read", 0, [PAGE], []);
        assert_eq!(c.conflicts().len(), 1);
    }

    #[test]
    fn two_reads_never_conflict_but_a_write_meets_both() {
        let mut c = Checker::new();
        c.operation(CopyIn, "read", 0, [PAGE], []);
        c.operation(CopyOut, "read", 0, [PAGE], []);
        assert_eq!(c.conflicts(), []);
        c.operation(Compute, "write", 0, [], [PAGE]);
        assert_eq!(c.conflicts().len(), 2);
    }

    #[test]
    fn an_ignored_wait_is_as_good_as_none() {
        let run = |ignore: Option<Site>| {
            let mut c = Checker::new();
            if let Some(site) = ignore {
                c.ignore(site);
            }
            c.operation(CopyIn, "gather", 0, [], [PAGE]);
            let gathered = c.record(CopyIn);
            c.wait(Compute, gathered, "arrive");
            c.operation(Compute, "attend", 0, [PAGE], []);
            (c.conflicts().len(), c.sites().collect::<Vec<_>>())
        };
        assert_eq!(run(None), (0, vec!["arrive"]));
        assert_eq!(run(Some("arrive")), (1, vec!["arrive"]));
    }
}
