//! What is said on stderr: messages, and one line of progress if a person is watching.

use std::fmt::{Arguments, Display};
use std::io::{IsTerminal, Write, stderr};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether a line of progress stands on the terminal.
static SHOWN: AtomicBool = AtomicBool::new(false);

/// Writes a line to stderr, in the place of a line of progress. Unlike `eprintln!` it survives a closed stderr.
pub fn say(line: Arguments) {
    let clear = if SHOWN.swap(false, Ordering::Relaxed) { "\r\x1b[2K" } else { "" };
    let _ = writeln!(stderr(), "{clear}{line}");
}

/// How far a prefill is.
pub fn prefilled(tokens: usize, share: f64) -> String {
    format!("prefill of {tokens} tokens, {:.0} %", 100.0 * share)
}

/// A line on a terminal that says what goes on and vanishes when it is over; nothing where stderr is not a terminal.
pub struct Progress {
    on_terminal: bool,
}

impl Progress {
    /// Nothing is shown yet.
    pub fn new() -> Progress {
        Progress { on_terminal: stderr().is_terminal() }
    }

    /// Replaces the line.
    pub fn show(&mut self, what: impl Display) {
        if self.on_terminal {
            let _ = write!(stderr(), "\r\x1b[2K{what} ...");
            SHOWN.store(true, Ordering::Relaxed);
        }
    }

    /// As [`Progress::show`], and a line where stderr is not a terminal: what may take seconds says first what it is.
    pub fn announce(&mut self, what: impl Display) {
        match self.on_terminal {
            true => self.show(what),
            false => say(format_args!("{what}")),
        }
    }

    /// Removes the line.
    pub fn clear(&mut self) {
        if SHOWN.swap(false, Ordering::Relaxed) {
            let _ = write!(stderr(), "\r\x1b[2K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
