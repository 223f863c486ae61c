//! The gather of a GPU's pairs by threads of the host: who waits for the GPU's letters, and answers them.
//!
//! One thread for all passes on the GPU. It is told of a letter before the GPU can write it, and looks at the bells of all
//! letters that are under way: passes of several callers ring in an order that only the GPU knows, and their queues wait
//! for each other. While letters are under way it polls; else it sleeps.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::device::cuda::mailbox::{Answers, BLOCKS, Mailbox};
use crate::device::link::CopyEngine;
use crate::device::trace::Place;
use crate::device::{Device, nvtx};
use crate::error::{Error, Result};
use crate::gather::{NodeId, Rows, Staging, Stores};
use crate::kv::host::HostLayer;
use crate::kv::{KvShape, PAGE};

/// Pairs are gathered and copied in pieces of so many bytes, so that the bus works on one while the next is gathered. A
/// copy costs the host 5 to 7 us (docs/design.md), this many bytes about 10 us on the bus.
const PIECE_BYTES: usize = 512 << 10;

/// How long it polls without a pause, and without sleeping: a layer takes 30 us to a millisecond.
const SPIN: Duration = Duration::from_micros(100);
const YIELD: Duration = Duration::from_millis(5);
const NAP: Duration = Duration::from_micros(50);

/// A letter that the GPU will write, and where the answer goes.
pub(crate) struct Letter {
    pub mailbox: Arc<Mailbox>,
    /// Its number.
    pub number: usize,
    /// Where what it wants begins.
    pub first: usize,
    /// Most pairs that it can want.
    pub room: usize,
    /// The staging block.
    pub block: usize,
    /// The same on the GPU.
    pub staged: u64,
    /// Shape of the pages.
    pub shape: KvShape,
    /// Pages of each sequence.
    pub hosts: Vec<Arc<HostLayer>>,
    /// Which pass and layer it belongs to, for traces.
    pub place: Place,
}

/// The thread.
pub(crate) struct HostGather {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    given: Mutex<Given>,
    news: Condvar,
}

/// What the thread has not seen.
#[derive(Default)]
struct Given {
    messages: Vec<Message>,
    /// Lists of pages, to be filled again.
    spare: Vec<Vec<Arc<HostLayer>>>,
    quit: bool,
}

enum Message {
    Expect(Letter),
    /// Letters of this mailbox that have not rung will not. Whoever says so hears when nobody works on them any more.
    Abandon(Arc<Mailbox>, Sender<()>),
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Given> {
        self.given.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn give(&self, message: Message) {
        self.lock().messages.push(message);
        self.news.notify_one();
    }
}

impl HostGather {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`Error::Device`]; [`Error::Usage`] if the system refuses a thread.
    pub(crate) fn new(device: &Device) -> Result<HostGather> {
        let gpu = device.gpu().expect("the host gathers for a GPU");
        let (answers, engine) = (Answers::new(gpu.driver())?, device.copy_engine());
        let shared = Arc::<Shared>::default();
        let given = shared.clone();
        let run = move || {
            engine.gather.bind_caller();
            answers.enter();
            let (letters, blocks, abandoned) = Default::default();
            Postman { answers, engine, letters, blocks, abandoned, idle_since: Instant::now() }.work(&given);
        };
        let thread = std::thread::Builder::new().name("gather".into()).spawn(run).map_err(|e| {
            Error::Usage(format!("no thread for --gather cpu: {e}; raise the limit on processes, or use --gather gpu"))
        })?;
        Ok(HostGather { shared, thread: Some(thread) })
    }

    /// A list of pages, to be filled.
    pub(crate) fn spare(&self) -> Vec<Arc<HostLayer>> {
        self.shared.lock().spare.pop().unwrap_or_default()
    }

    /// The GPU will write this letter, and wait for the answer. Said before it can ring.
    pub(crate) fn expect(&self, letter: Letter) {
        self.shared.give(Message::Expect(letter));
    }

    /// The letters of `mailbox` that are under way may never come: a pass was given up. When this returns, the GPU waits for
    /// none of them any more, and nothing is copied for them.
    pub(crate) fn abandon(&self, mailbox: &Arc<Mailbox>) {
        let (done, is_done) = channel();
        self.shared.give(Message::Abandon(mailbox.clone(), done));
        // An error is the end of the thread, which leaves nothing either.
        let _ = is_done.recv();
    }
}

impl Drop for HostGather {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.news.notify_one();
        if let Some(thread) = self.thread.take() {
            // Panics were caught.
            let _ = thread.join();
        }
    }
}

/// What the thread has.
struct Postman {
    answers: Answers,
    engine: Arc<CopyEngine>,
    /// Under way, in the order in which they were expected.
    letters: Vec<Letter>,
    /// The last letter of each staging block, until the GPU has taken what came by it.
    blocks: Vec<(Weak<Mailbox>, [Option<usize>; BLOCKS])>,
    /// Letters that nobody answers. The GPU may wait for such a one twice: by the pass that was given up, and by the one
    /// before. So they are answered again and again until their owner is gone, which waits for the GPU.
    abandoned: Vec<(Weak<Mailbox>, usize)>,
    idle_since: Instant,
}

impl Postman {
    fn work(mut self, shared: &Shared) {
        while self.hear(shared) {
            self.abandoned.retain(|(mailbox, number)| {
                let mailbox = mailbox.upgrade();
                mailbox.iter().filter(|mailbox| mailbox.is_taken(*number)).for_each(|mailbox| mailbox.raise(*number));
                mailbox.is_some()
            });
            match (0..self.letters.len()).find(|&i| self.has_come(i)) {
                Some(i) => {
                    let letter = self.letters.remove(i);
                    shared.lock().spare.push(self.answer(letter));
                    self.idle_since = Instant::now();
                }
                None => match self.idle_since.elapsed() {
                    short if short < SPIN => std::hint::spin_loop(),
                    medium if medium < YIELD => std::thread::yield_now(),
                    _ => std::thread::sleep(NAP),
                },
            }
        }
        self.letters.drain(..).for_each(|letter| drop(release(letter)));
    }

    /// Takes what was said meanwhile; sleeps if there is nothing to do. `false`: the end.
    fn hear(&mut self, shared: &Shared) -> bool {
        let mut given = shared.lock();
        while self.letters.is_empty() && self.abandoned.is_empty() && given.messages.is_empty() && !given.quit {
            given = shared.news.wait(given).unwrap_or_else(|e| e.into_inner());
        }
        if !given.messages.is_empty() {
            self.idle_since = Instant::now();
        }
        for message in given.messages.drain(..) {
            match message {
                Message::Expect(letter) => self.letters.push(letter),
                Message::Abandon(mailbox, done) => {
                    self.answers.drain();
                    let gone = self.letters.extract_if(.., |letter| Arc::ptr_eq(&letter.mailbox, &mailbox));
                    self.abandoned.extend(gone.map(release));
                    self.blocks.retain(|(of, _)| !is(of, &mailbox));
                    // Nobody listens only if the caller's thread has ended.
                    let _ = done.send(());
                }
            }
        }
        !given.quit
    }

    /// Whether a letter has rung, and its staging block is free.
    fn has_come(&mut self, i: usize) -> bool {
        let Letter { mailbox, number, block, .. } = &self.letters[i];
        let users = self.blocks.iter().find(|(of, _)| is(of, mailbox));
        let before = users.and_then(|(_, last)| last[*block]);
        mailbox.rung(*number).is_some() && before.is_none_or(|letter| mailbox.is_taken(letter))
    }

    /// Brings what a letter wants. However that ends, the GPU goes on. Returns its list of pages, empty.
    fn answer(&mut self, mut letter: Letter) -> Vec<Arc<HostLayer>> {
        let (mailbox, number) = (letter.mailbox.clone(), letter.number);
        let n = mailbox.rung(number).expect("it has come");
        mailbox.open(number);
        letter.place.enter();
        let _range = nvtx::range("gather");
        let brought = catch_unwind(AssertUnwindSafe(|| self.bring(&letter, n)));
        // Whoever sees the flag may take it that nobody reads the pages any more.
        let mut hosts = std::mem::take(&mut letter.hosts);
        hosts.clear();
        let brought = brought.unwrap_or_else(|_| Err("a thread of the gather panicked".into()));
        match brought.and_then(|()| self.answers.raise(mailbox.flag(number)).map_err(|e| e.to_string())) {
            Ok(()) => self.keep(&letter),
            Err(why) => {
                mailbox.fail(why);
                self.answers.drain(); // the block may be filled again
                mailbox.raise(number);
            }
        }
        hosts
    }

    /// Notes who has a staging block.
    fn keep(&mut self, letter: &Letter) {
        self.blocks.retain(|(of, _)| of.strong_count() > 0);
        let at = self.blocks.iter().position(|(of, _)| is(of, &letter.mailbox)).unwrap_or_else(|| {
            self.blocks.push((Arc::downgrade(&letter.mailbox), [None; BLOCKS]));
            self.blocks.len() - 1
        });
        let last = &mut self.blocks[at].1;
        // What came by this letter before was taken, or it could not have rung.
        last.iter_mut().filter(|of| **of == Some(letter.number)).for_each(|of| *of = None);
        last[letter.block] = Some(letter.number);
    }

    /// `n` pairs to the GPU.
    #[allow(unsafe_code)]
    fn bring(&self, letter: &Letter, n: usize) -> Result<(), String> {
        let Letter { mailbox, first, room, block, shape, hosts, .. } = letter;
        if n > *room {
            return Err(format!("the GPU wants {n} pairs of a layer, of at most {room}"));
        }
        // SAFETY: the bell has rung; the flag is raised behind this.
        let wanted = unsafe { mailbox.read_wanted(*first, n) };
        let page = |i: usize| {
            let (sequence, page) = (wanted[i].head as usize / shape.n_kv_heads, wanted[i].position as usize / PAGE);
            hosts.get(sequence).and_then(|host| host.page(page))
        };
        if let Some(missing) = (0..n).find(|&i| page(i).is_none()) {
            return Err(format!("position {} of the GPU's selection is not on the host", wanted[missing].position));
        }
        let (pair_bytes, mut done) = (shape.pair_bytes(), 0);
        while done < n {
            self.engine.check()?;
            let rows = done..n.min(done + (PIECE_BYTES / pair_bytes).max(1));
            // SAFETY: the GPU has taken what was in the block before (`has_come`); pieces do not overlap.
            let bytes = unsafe { mailbox.block(*block, rows.start * pair_bytes..rows.end * pair_bytes) };
            let source = |i: usize| {
                let (i, page) = (rows.start + i, page(rows.start + i).expect("looked for above"));
                let head = wanted[i].head as usize % shape.n_kv_heads;
                &page.bytes()[shape.pair(head, wanted[i].position as usize % PAGE)]
            };
            let node = |i: usize| page(rows.start + i).and_then(|page| page.node()).unwrap_or(NodeId(0));
            let pairs = Rows { n_rows: rows.len(), row_bytes: pair_bytes, source, node };
            // The bus reads the block next, and not through the caches of these threads.
            self.engine.gather(&pairs, Staging { bytes: &mut *bytes, slot: |i| i }, Stores::NonTemporal);
            let to = letter.staged + (rows.start * pair_bytes) as u64;
            // SAFETY: the GPU's block is as large; nobody writes this one before the GPU has taken its pairs.
            unsafe { self.answers.copy(to, bytes) }.map_err(|e| e.to_string())?;
            done = rows.end;
        }
        Ok(())
    }
}

fn is(of: &Weak<Mailbox>, mailbox: &Arc<Mailbox>) -> bool {
    std::ptr::eq(of.as_ptr(), Arc::as_ptr(mailbox))
}

/// Nobody answers this letter: the GPU goes on, and the pages are free.
fn release(letter: Letter) -> (Weak<Mailbox>, usize) {
    let Letter { mailbox, number, hosts, .. } = letter;
    drop(hosts);
    mailbox.raise(number);
    (Arc::downgrade(&mailbox), number)
}
