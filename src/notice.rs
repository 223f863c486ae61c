//! What the library has to say that is no error of a call: a line for people. It goes to stderr, as the command line wants
//! it; or to whoever listens on this thread, or waits to be fetched, as the C interface does, which hands it to its callers'
//! log callbacks.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt::Arguments;
use std::io::Write;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How much a line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// What works, and may not be what is wanted.
    Warning,
    /// What happens once, and takes a while or tells why something is as it is.
    Info,
}

/// A line that nobody has fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// How much it matters.
    pub weight: Weight,
    /// One line.
    pub text: String,
}

/// Lines that wait. The oldest go if nobody fetches them.
const MOST: usize = 100;

/// `None`: lines go to stderr.
static WAITING: Mutex<Option<VecDeque<Notice>>> = Mutex::new(None);
/// Whether there are lines that wait, so that whoever looks often takes no lock.
static ANY: AtomicBool = AtomicBool::new(false);

type Listener = Rc<dyn Fn(Notice)>;

thread_local! {
    static LISTENER: RefCell<Option<Listener>> = const { RefCell::new(None) };
}

/// Another listener for this thread, and the one before. At a thread's very end there is none.
fn listen(listener: Option<Listener>) -> Option<Listener> {
    LISTENER.try_with(|own| own.replace(listener)).ok().flatten()
}

/// While `call` runs, lines of this thread go to `listener` at once: for calls that take long and may fail. Whoever says a
/// line holds no lock, as the listener may do what it likes.
pub fn hear<T>(listener: impl Fn(Notice) + 'static, call: impl FnOnce() -> T) -> T {
    struct Before(Option<Listener>);
    impl Drop for Before {
        fn drop(&mut self) {
            listen(self.0.take());
        }
    }
    let _before = Before(listen(Some(Rc::new(listener))));
    call()
}

fn waiting() -> MutexGuard<'static, Option<VecDeque<Notice>>> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on lines wait for [`fetch`], in this process.
pub fn keep() {
    waiting().get_or_insert_default();
}

/// All lines that wait, the oldest first.
pub fn fetch() -> Vec<Notice> {
    if !ANY.load(Ordering::Relaxed) {
        return Vec::new();
    }
    let mut waiting = waiting();
    ANY.store(false, Ordering::Relaxed);
    waiting.iter_mut().flat_map(|lines| lines.drain(..)).collect()
}

pub(crate) fn warn(text: Arguments) {
    tell(Weight::Warning, text);
}

pub(crate) fn info(text: Arguments) {
    tell(Weight::Info, text);
}

fn tell(weight: Weight, text: Arguments) {
    if let Some(listener) = LISTENER.try_with(|own| own.borrow().clone()).ok().flatten() {
        return listener(Notice { weight, text: text.to_string() });
    }
    let mut waiting = waiting();
    let Some(lines) = &mut *waiting else {
        let who = if weight == Weight::Warning { "warning" } else { "specache" };
        let _nobody_hears = writeln!(std::io::stderr(), "{who}: {text}");
        return;
    };
    if lines.len() == MOST {
        lines.pop_front();
    }
    lines.push_back(Notice { weight, text: text.to_string() });
    ANY.store(true, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other tests of this process may say something too.
    #[test]
    fn lines_wait_in_their_order_and_are_fetched_once() {
        keep();
        (0..2 * MOST).for_each(|i| info(format_args!("line {i} of a test")));
        warn(format_args!("the last line of a test"));
        let mine = || fetch().into_iter().filter(|notice| notice.text.ends_with("of a test")).collect::<Vec<_>>();
        let lines = mine();
        assert!(lines.len() > MOST / 2 && lines.len() <= MOST, "{}", lines.len());
        assert_eq!(lines.last().unwrap().weight, Weight::Warning);
        let numbers = lines.iter().filter_map(|n| n.text.split(' ').nth(1)?.parse::<usize>().ok());
        assert!(numbers.is_sorted() && lines[0].weight == Weight::Info);
        assert!(mine().is_empty());
    }

    #[test]
    fn a_listener_hears_its_thread_at_once_and_no_longer_than_its_call() {
        keep();
        let heard = Rc::new(RefCell::new(Vec::new()));
        let listener = |whose: &'static str| {
            let heard = heard.clone();
            move |notice: Notice| heard.borrow_mut().push((whose, notice.text))
        };
        let say = |text: &str| info(format_args!("{text}, to be heard"));
        let outer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            hear(listener("outer"), || {
                say("first");
                assert_eq!(heard.borrow().len(), 1, "at once");
                std::thread::scope(|scope| scope.spawn(|| say("another thread")).join().unwrap());
                hear(listener("inner"), || say("second"));
                say("third");
                panic!("as a call may")
            })
        }));
        assert!(outer.is_err());
        say("afterwards");
        let [first, second, third] = ["first", "second", "third"].map(|text| format!("{text}, to be heard"));
        assert_eq!(*heard.borrow(), [("outer", first), ("inner", second), ("outer", third)]);
    }
}
