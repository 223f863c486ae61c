//! The 16-bit copy of a sequence on the host: a page table per layer over the slab, and the copies that fill and read it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::slab::{PageId, PageRef, Slab, UniquePage};
use crate::device::link::CopyEngine;
use crate::device::order::{Resource, StreamId, Uses};
use crate::device::{Buffer, Carried, Device, Event, InFlight, Job};

/// A wide page on the device. Shared with the copy stream while a copy reads it; whoever writes needs it alone.
pub type WidePage = Arc<Buffer>;

/// The host pages of one layer, from position 0 on. Each entry is written once, when its page is complete: a page that is
/// still on its way cannot be read, because it is not here.
pub struct HostLayer {
    slab: Slab,
    /// `[room]`.
    pages: Box<[OnceLock<PageRef>]>,
    /// `[room]`: which page of the slab each is, or will be when its copy is complete.
    ids: Box<[OnceLock<PageId>]>,
}

impl HostLayer {
    /// A table with room for `room` pages, which begins with these.
    pub fn new(slab: &Slab, room: usize, pages: impl Iterator<Item = PageRef>) -> HostLayer {
        let mut pages: Vec<OnceLock<PageRef>> = pages.map(OnceLock::from).collect();
        assert!(pages.len() <= room, "{} pages in a table for {room}", pages.len());
        pages.resize_with(room, OnceLock::new);
        let id = |page: &OnceLock<PageRef>| page.get().map_or(OnceLock::new(), |page| page.id().into());
        HostLayer { slab: slab.clone(), ids: pages.iter().map(id).collect(), pages: pages.into() }
    }

    /// Pages that it has room for.
    pub fn room(&self) -> usize {
        self.pages.len()
    }

    /// Page `index`, if it is complete.
    pub fn page(&self, index: usize) -> Option<&PageRef> {
        self.pages.get(index)?.get()
    }

    /// All complete pages, in order.
    pub fn pages(&self) -> impl Iterator<Item = &PageRef> {
        self.pages.iter().map_while(OnceLock::get)
    }

    /// What the order checker calls page `index`; `None` if it is neither here nor on its way.
    pub fn resource(&self, index: usize) -> Option<Resource> {
        Some(Resource::HostPage(self.slab.id(), self.ids.get(index)?.get()?.index()))
    }
}

impl Drop for HostLayer {
    /// All leases end under one lock.
    fn drop(&mut self) {
        let mut pages: Vec<PageRef> = self.pages.iter_mut().filter_map(OnceLock::take).collect();
        self.slab.free_batch(pages.drain(..));
    }
}

/// When the pages of a table are complete: those of its last page-out, and all before them. Pages go out in order, so a
/// later one is complete no sooner.
#[derive(Clone, Copy, Default)]
pub struct Completion {
    /// The first page of the last page-out, and its event.
    last: Option<(usize, Event)>,
    /// The event of the page-out before it.
    before: Option<Event>,
}

impl Completion {
    /// Pages from `first` on were sent; they are complete after `event`.
    pub fn sent(&mut self, first: usize, event: Event) {
        *self = Completion { last: Some((first, event)), before: self.last.map(|(_, event)| event) };
    }

    /// After which event pages up to `page` are complete; `None` if they are.
    pub fn of(&self, page: usize) -> Option<Event> {
        match self.last {
            Some((first, event)) if page >= first => Some(event),
            _ => self.before,
        }
    }
}

/// Copies complete device pages to the host: one job for each cache, launched again and again. A run does what one launch
/// was given, in order.
pub struct PageOut {
    engine: Arc<CopyEngine>,
    launches: Mutex<Launches>,
    failure: OnceLock<String>,
}

#[derive(Default)]
struct Launches {
    pages: VecDeque<Out>,
    /// Pages of each launch that has not run; the last entry is that of the next launch.
    counts: VecDeque<usize>,
}

/// A page on its way out.
struct Out {
    from: WidePage,
    to: UniquePage,
    host: Arc<HostLayer>,
    index: usize,
}

impl PageOut {
    /// Nothing is on its way.
    pub fn new(device: &Device) -> Arc<PageOut> {
        let launches = Launches { pages: VecDeque::new(), counts: VecDeque::from([0]) };
        Arc::new(PageOut { engine: device.copy_engine(), launches: Mutex::new(launches), failure: OnceLock::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Launches> {
        self.launches.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Why a copy failed, if one has: the host's pages are not complete then.
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Gives the next launch a page: to be page `index` of `host`, by way of the leased page `to`.
    pub fn add(&self, from: WidePage, to: UniquePage, host: &Arc<HostLayer>, index: usize) {
        host.ids[index].set(to.id()).expect("a page is paged out once");
        let mut launches = self.lock();
        launches.pages.push_back(Out { from, to, host: host.clone(), index });
        *launches.counts.back_mut().expect("the next launch's count") += 1;
    }

    /// Begins to copy what was added. Returns when that is done, and the bytes that it moves.
    pub fn launch(self: &Arc<Self>, device: &Device) -> (Event, u64) {
        device.after(StreamId::CopyOut, device.record(StreamId::Compute), "a page is complete before it is paged out");
        let mut launches = self.lock();
        let count = *launches.counts.back().expect("the next launch's count");
        launches.counts.push_back(0);
        let first = launches.pages.len() - count;
        let bytes = launches.pages.range(first..).map(|page| page.from.len() as u64).sum();
        let uses = |uses: &mut Uses| {
            uses.reads.extend(launches.pages.range(first..).map(|p| Resource::DevicePage(p.from.id())));
            uses.writes.extend(launches.pages.range(first..).flat_map(|p| p.host.resource(p.index)));
        };
        let Some(gpu) = device.gpu() else {
            return (device.launch(StreamId::CopyOut, "page out", uses, self.clone()), bytes);
        };
        let copies = device.operation_on(StreamId::CopyOut, "page out", bytes, uses);
        // A GPU's driver is given the copies at once. The tables name the pages from now on: whoever reads them is ordered
        // behind the event, as is whoever frees them.
        launches.counts.pop_front();
        if let Err(why) = self.engine.check() {
            self.fail(&why);
        }
        let mut read = Vec::with_capacity(count);
        for Out { from, mut to, host, index } in launches.pages.drain(..) {
            gpu.page_out(to.bytes_mut(), from.address());
            assert!(host.pages[index].set(to.share()).is_ok(), "a page is paged out once");
            read.push(from);
        }
        drop(copies);
        let event = device.record(StreamId::CopyOut);
        gpu.retain(event, read);
        (event, bytes)
    }

    fn fail(&self, why: &str) {
        let _first_reason_wins = self.failure.set(format!("pages could not be copied to the host: {why}"));
    }
}

/// The pages of the launch that runs. However the run ends, none of them is left for the next one.
struct Running<'a> {
    page_out: &'a PageOut,
    left: usize,
}

impl Iterator for Running<'_> {
    type Item = Out;

    fn next(&mut self) -> Option<Out> {
        self.left = self.left.checked_sub(1)?;
        self.page_out.lock().pages.pop_front()
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.page_out.fail("a thread of the copy panicked");
        }
        self.for_each(drop);
    }
}

impl Job for PageOut {
    fn run(&self) -> u64 {
        let count = self.lock().counts.pop_front().expect("a launch");
        let mut running = Running { page_out: self, left: count };
        if let Err(why) = self.engine.check() {
            self.fail(&why);
            return 0;
        }
        let bytes = self.lock().pages.iter().take(count).map(|page| page.from.len() as u64).sum();
        self.engine.transfer(bytes, || {
            for Out { from, mut to, host, index } in &mut running {
                to.bytes_mut().copy_from_slice(from.bytes());
                assert!(host.pages[index].set(to.share()).is_ok(), "a page is paged out once");
            }
        });
        bytes
    }
}

/// Brings a layer's first host pages back into device pages: one job for each set of pages.
pub struct PageIn {
    engine: Arc<CopyEngine>,
    launch: Mutex<Option<In>>,
}

struct In {
    pages: Carried<Vec<WidePage>>,
    host: Arc<HostLayer>,
    from: Range<usize>,
}

impl PageIn {
    /// Nothing is on its way.
    pub fn new(device: &Device) -> Arc<PageIn> {
        Arc::new(PageIn { engine: device.copy_engine(), launch: Mutex::new(None) })
    }

    /// Begins to copy the host pages `from` into as many of `pages`, which must be held alone. `paged_out`: when the last
    /// of them is complete.
    pub fn launch(
        self: &Arc<Self>,
        device: &Device,
        host: &Arc<HostLayer>,
        from: Range<usize>,
        pages: &mut InFlight<Vec<WidePage>>,
        paged_out: Option<Event>,
    ) {
        device.after(StreamId::CopyIn, device.record(StreamId::Compute), "device pages are free before a load");
        if let Some(event) = paged_out {
            device.after(StreamId::CopyIn, event, "host pages are complete before a load");
        }
        let carried = pages.send();
        let away = carried.clone();
        *self.lock() = Some(In { pages: carried, host: host.clone(), from: from.clone() });
        let uses = |uses: &mut Uses| {
            uses.reads.extend(from.clone().flat_map(|index| host.resource(index)));
            away.look(|pages| {
                uses.writes.extend(pages.iter().take(from.len()).map(|page| Resource::DevicePage(page.id())));
            });
        };
        let Some(gpu) = device.gpu() else {
            away.depart(device.launch(StreamId::CopyIn, "load", uses, self.clone()));
            return;
        };
        let bytes = away.look(|pages| pages.iter().take(from.len()).map(|page| page.len() as u64).sum());
        let copies = device.operation_on(StreamId::CopyIn, "load", bytes, uses);
        let In { pages, host, from } = self.lock().take().expect("just set");
        pages.work(|pages| {
            self.engine.check()?;
            for (page, from) in pages.iter().zip(&host.pages[from]) {
                let from = from.get().ok_or("a page is not on the host")?;
                gpu.page_in(page.address(), from.bytes());
            }
            Ok(())
        });
        drop(copies);
        away.depart(device.record(StreamId::CopyIn));
    }

    fn lock(&self) -> MutexGuard<'_, Option<In>> {
        self.launch.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Job for PageIn {
    fn run(&self) -> u64 {
        let In { pages, host, from } = self.lock().take().expect("a launch");
        let mut bytes = 0;
        pages.work(|pages| {
            self.engine.check()?;
            let complete = host.pages().count();
            if complete < from.end {
                return Err(format!("page {complete} is not on the host"));
            }
            bytes = pages.iter().take(from.len()).map(|page| page.len() as u64).sum();
            self.engine.transfer(bytes, || {
                for (page, from) in pages.iter_mut().zip(&host.pages[from]) {
                    let page = Arc::get_mut(page).expect("a page that is loaded has one owner");
                    page.bytes_mut().copy_from_slice(from.get().expect("complete").bytes());
                }
            });
            Ok(())
        });
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceOptions;

    struct Nothing;

    impl Job for Nothing {
        fn run(&self) -> u64 {
            0
        }
    }

    /// A page waits for the page-out that it was in, and older ones for the last of theirs.
    #[test]
    fn pages_wait_for_no_later_page_out() {
        let device = Device::cpu(&DeviceOptions { threads: Some(1), ..DeviceOptions::default() }).unwrap();
        let [first, second, third] =
            [(); 3].map(|()| device.launch(StreamId::CopyOut, "test", |_| {}, Arc::new(Nothing)));
        let mut completion = Completion::default();
        assert_eq!(completion.of(0), None);
        completion.sent(0, first);
        assert_eq!([0, 7].map(|page| completion.of(page)), [Some(first); 2]);
        completion.sent(2, second);
        assert_eq!([0, 1, 2, 3].map(|page| completion.of(page)), [first, first, second, second].map(Some));
        completion.sent(4, third);
        assert_eq!([0, 3, 4].map(|page| completion.of(page)), [second, second, third].map(Some));
    }
}
