//! The gather of a GPU's pairs by threads of the host: who waits for the GPU's letters, and answers them.
//!
//! One thread for all passes on the GPU. It is told of a letter before the GPU can write it, and looks at the bells of all
//! letters that are under way: passes of several callers ring in an order that only the GPU knows, and their queues wait
//! for each other. While letters are under way it polls; else it sleeps. It never calls the driver, which may be waiting for
//! it (`device/cuda/mailbox.rs`).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::device::cuda::mailbox::{BLOCKS, Failure, Mailbox};
use crate::device::link::CopyEngine;
use crate::device::trace::Place;
use crate::device::{Device, nvtx};
use crate::error::{Error, Result};
use crate::gather::{NodeId, Rows, Staging, Stores};
use crate::kv::host::HostLayer;
use crate::kv::{KvShape, PAGE};

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
    /// The block that they go to.
    pub block: usize,
    /// Shape of the pages.
    pub shape: KvShape,
    /// Pages of each sequence.
    pub hosts: Vec<Arc<HostLayer>>,
    /// Told why they could not be brought.
    pub failure: Failure,
    /// Which pass and layer it belongs to, for traces.
    pub place: Place,
}

impl Letter {
    /// Nobody reads its pages any more, and the GPU goes on. Whoever sees the flag may free the pages, so it comes last.
    fn close(&mut self, brought: Result<(), String>) {
        if let Err(why) = brought {
            let _ = self.failure.set(why); // only the first counts
        }
        self.hosts.clear();
        self.mailbox.raise(self.number);
    }
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
    /// Whether there is something in `given` that the thread has not seen: it polls this and not the lock.
    any: AtomicBool,
}

/// What the thread has not seen.
#[derive(Default)]
struct Given {
    messages: Vec<Message>,
    /// Lists of pages, to be filled again.
    spare: Vec<Vec<Arc<HostLayer>>>,
    /// Nobody has letters any more.
    quit: bool,
    /// The thread has ended.
    over: bool,
}

enum Message {
    Expect(Letter),
    /// Letters of this mailbox that are under way may not come. Whoever says so hears when nobody works on them any more.
    Abandon(Weak<Mailbox>, Sender<()>),
    /// There is no such mailbox any more, and nothing on the GPU waits for it.
    Forget(Weak<Mailbox>, Sender<()>),
}

/// What letters fail with whose pass was given up.
const GIVEN_UP: &str = "the pass that wanted the pairs was given up";
/// And those that nobody is there for.
const ENDED: &str = "the gather's thread has ended";

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Given> {
        self.given.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn give(&self, message: Message) {
        let mut given = self.lock();
        match message {
            Message::Expect(mut letter) if given.over => letter.close(Err(ENDED.into())),
            // An abandonment comes to an end by being dropped.
            _ if given.over => {}
            message => given.messages.push(message),
        }
        drop(given);
        self.wake();
    }

    fn wake(&self) {
        self.any.store(true, Ordering::Release);
        self.news.notify_one();
    }
}

impl HostGather {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`Error::Device`] if the system refuses a thread.
    pub(crate) fn new(device: &Device) -> Result<HostGather> {
        let (engine, shared) = (device.copy_engine(), Arc::<Shared>::default());
        let ending = Ending(shared.clone());
        let run = move || {
            engine.gather.bind_caller();
            let (letters, blocks, abandoned) = Default::default();
            Postman { engine, letters, blocks, abandoned, idle_since: Instant::now() }.work(&ending.0);
        };
        let thread = std::thread::Builder::new().name("gather".into()).spawn(run).map_err(|e| {
            Error::Device(format!(
                "the thread that gathers for a GPU cannot be started: {e}; raise the limit on processes, or let the GPU gather"
            ))
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

    /// A pass was given up. When this returns, nobody works on letters of `mailbox`, and the GPU waits for none of them.
    pub(crate) fn abandon(&self, mailbox: &Arc<Mailbox>) {
        self.ask(mailbox, Message::Abandon);
    }

    /// The mailbox is about to be freed, and the GPU waits for nothing of it. When this returns, nobody else has it: its memory is
    /// freed by the caller and not by the thread, which calls no driver.
    pub(crate) fn forget(&self, mailbox: &Arc<Mailbox>) {
        self.ask(mailbox, Message::Forget);
        while Arc::strong_count(mailbox) > 1 {
            std::thread::yield_now();
        }
    }

    fn ask(&self, mailbox: &Arc<Mailbox>, message: fn(Weak<Mailbox>, Sender<()>) -> Message) {
        let (done, is_done) = channel();
        self.shared.give(message(Arc::downgrade(mailbox), done));
        // An error is the end of the thread, which leaves nothing either.
        let _ = is_done.recv();
    }
}

impl Drop for HostGather {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // A panic has left nothing behind: see `Ending`.
            let _ = thread.join();
        }
    }
}

/// However the thread ends, letters under way are answered once, and nobody expects others. (One whose number has an answer that
/// the GPU has not taken is not told apart here: a panic outside of `bring`, of which none is known, may leave it waiting.)
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        let mut given = self.0.lock();
        given.over = true;
        for message in given.messages.drain(..) {
            if let Message::Expect(mut letter) = message {
                letter.close(Err(ENDED.into()));
            }
        }
    }
}

/// What the thread has.
struct Postman {
    engine: Arc<CopyEngine>,
    /// Under way, in the order in which they were expected.
    letters: Vec<Letter>,
    /// The last letter of each block, until the GPU has taken what came by it.
    blocks: Vec<(Weak<Mailbox>, [Option<usize>; BLOCKS])>,
    abandoned: Vec<Abandoned>,
    idle_since: Instant,
}

/// A letter that nobody answers and that the GPU may wait for, once it has taken the answer to the one before with this number:
/// its flag stands for that yet.
struct Abandoned {
    mailbox: Weak<Mailbox>,
    number: usize,
}

impl Postman {
    fn work(mut self, shared: &Shared) {
        while self.hear(shared) {
            self.abandoned.retain(|letter| letter.still_waits());
            match (0..self.letters.len()).find(|&i| self.has_come(i)) {
                Some(i) => {
                    let letter = self.letters.remove(i);
                    let hosts = self.answer(letter);
                    shared.lock().spare.push(hosts);
                    self.idle_since = Instant::now();
                }
                None => match self.idle_since.elapsed() {
                    short if short < SPIN => std::hint::spin_loop(),
                    medium if medium < YIELD => std::thread::yield_now(),
                    _ => std::thread::sleep(NAP),
                },
            }
        }
    }

    /// Takes what was said meanwhile; sleeps if there is nothing to do. `false`: the end.
    fn hear(&mut self, shared: &Shared) -> bool {
        let busy = !self.letters.is_empty() || !self.abandoned.is_empty();
        if busy && !shared.any.swap(false, Ordering::Acquire) {
            return true;
        }
        let mut given = shared.lock();
        while !busy && given.messages.is_empty() && !given.quit {
            given = shared.news.wait(given).unwrap_or_else(|e| e.into_inner());
        }
        self.idle_since = Instant::now();
        for message in given.messages.drain(..) {
            match message {
                Message::Expect(letter) => self.letters.push(letter),
                // Nobody listens only if the caller's thread has ended.
                Message::Abandon(mailbox, done) => {
                    self.abandon(&mailbox);
                    let _ = done.send(());
                }
                Message::Forget(mailbox, done) => {
                    self.abandon(&mailbox);
                    self.abandoned.retain(|letter| !letter.mailbox.ptr_eq(&mailbox));
                    let _ = done.send(());
                }
            }
        }
        !given.quit
    }

    /// Letters of this mailbox fail.
    fn abandon(&mut self, mailbox: &Weak<Mailbox>) {
        self.blocks.retain(|(of, _)| !of.ptr_eq(mailbox));
        for mut letter in self.letters.extract_if(.., |letter| is(mailbox, &letter.mailbox)) {
            if letter.mailbox.is_up(letter.number) {
                let _ = letter.failure.set(GIVEN_UP.into()); // only the first counts
                self.abandoned.push(Abandoned { mailbox: mailbox.clone(), number: letter.number });
            } else {
                letter.close(Err(GIVEN_UP.into()));
            }
        }
    }

    /// Whether a letter has rung, and its block is free. Of letters with one number the first has rung. Of letters with one
    /// block the first has it: the GPU takes them in this order, in which they need not ring, as selections of several modes run
    /// in several queues.
    fn has_come(&self, i: usize) -> bool {
        let Letter { mailbox, number, block, .. } = &self.letters[i];
        if mailbox.rung(*number).is_none() {
            return false;
        }
        let in_front = |letter: &Letter| {
            Arc::ptr_eq(&letter.mailbox, mailbox) && (letter.number == *number || letter.block == *block)
        };
        let users = self.blocks.iter().find(|(of, _)| is(of, mailbox));
        let before = users.and_then(|(_, last)| last[*block]);
        !self.letters[..i].iter().any(in_front) && before.is_none_or(|letter| mailbox.is_taken(letter))
    }

    /// Brings what a letter wants. However that ends, the GPU goes on. Returns its list of pages, empty.
    fn answer(&mut self, mut letter: Letter) -> Vec<Arc<HostLayer>> {
        let n = letter.mailbox.rung(letter.number).expect("it has come");
        letter.place.enter();
        let _range = nvtx::range("gather");
        self.lend(&letter);
        letter.mailbox.open(letter.number);
        let brought = catch_unwind(AssertUnwindSafe(|| self.bring(&letter, n)));
        letter.close(brought.unwrap_or_else(|_| Err("a thread of the gather panicked".into())));
        letter.hosts
    }

    /// Notes who has a block.
    fn lend(&mut self, letter: &Letter) {
        self.blocks.retain(|(of, _)| of.strong_count() > 0);
        let at = self.blocks.iter().position(|(of, _)| is(of, &letter.mailbox)).unwrap_or_else(|| {
            self.blocks.push((Arc::downgrade(&letter.mailbox), [None; BLOCKS]));
            self.blocks.len() - 1
        });
        let last = &mut self.blocks[at].1;
        // What came by this number before was taken, or it could not have rung.
        last.iter_mut().filter(|of| **of == Some(letter.number)).for_each(|of| *of = None);
        last[letter.block] = Some(letter.number);
    }

    /// `n` pairs into the letter's block.
    #[allow(unsafe_code)]
    fn bring(&self, letter: &Letter, n: usize) -> Result<(), String> {
        let Letter { mailbox, first, room, block, shape, hosts, .. } = letter;
        self.engine.check()?;
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
        let source = |i: usize| {
            let pair = shape.pair(wanted[i].head as usize % shape.n_kv_heads, wanted[i].position as usize % PAGE);
            &page(i).expect("looked for above").bytes()[pair]
        };
        let node = |i: usize| page(i).and_then(|page| page.node()).unwrap_or(NodeId(0));
        // SAFETY: the GPU has taken what was in the block before (`has_come`), and this thread lends the blocks.
        let bytes = unsafe { mailbox.block(*block, n * shape.pair_bytes()) };
        let pairs = Rows { n_rows: n, row_bytes: shape.pair_bytes(), source, node };
        // The bus reads the block next, and not through the caches of these threads.
        self.engine.gather(&pairs, Staging { bytes, slot: |i| i }, Stores::NonTemporal);
        Ok(())
    }
}

impl Drop for Postman {
    fn drop(&mut self) {
        self.letters.iter_mut().for_each(|letter| letter.close(Err(ENDED.into())));
    }
}

impl Abandoned {
    /// Whether it has to be answered still; does so once the answer before it is taken.
    fn still_waits(&self) -> bool {
        match self.mailbox.upgrade() {
            Some(mailbox) if mailbox.is_taken(self.number) => mailbox.raise(self.number),
            Some(_) => return true,
            None => {}
        }
        false
    }
}

fn is(of: &Weak<Mailbox>, mailbox: &Arc<Mailbox>) -> bool {
    std::ptr::eq(of.as_ptr(), Arc::as_ptr(mailbox))
}
