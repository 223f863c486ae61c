//! What is said on stderr: messages, and one line of progress if a person is watching.

use std::fmt::{Arguments, Display};
use std::io::{IsTerminal, Write, stderr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::output;

/// Whether a line of progress stands on the terminal.
static SHOWN: AtomicBool = AtomicBool::new(false);

/// Back to the beginning of the line, which is emptied.
const CLEAR: &str = "\r\x1b[2K";
/// Time between two lines of progress; a step of a small model takes less.
const PAUSE: Duration = Duration::from_millis(100);
/// Lines of progress that may come at once: a short stage before a long one is not to stand there in its place.
const AT_ONCE: u32 = 3;
/// Columns of a terminal that does not say how many it has.
const USUAL_COLUMNS: u16 = 80;

/// Writes a line to stderr, in the place of a line of progress, and behind a line of stdout that has not ended: both may be one
/// terminal or one pipe. Unlike `eprintln!` it survives a closed stderr.
pub fn say(line: Arguments) {
    let clear = if SHOWN.swap(false, Ordering::Relaxed) { CLEAR } else { "" };
    let begin = if output::end_line() { "\n" } else { "" };
    write(&format!("{clear}{begin}{line}\n"));
}

/// In one piece, so that nothing of another process comes between.
fn write(text: &str) {
    let _ = stderr().write_all(text.as_bytes());
}

/// Whether the terminal knows no colours and no way back in a line.
pub fn is_dumb() -> bool {
    std::env::var_os("TERM").is_some_and(|name| name == "dumb")
}

/// How far a prefill is.
pub fn prefilled(tokens: usize, share: f64) -> String {
    format!("prefill of {tokens} tokens, {:.0} %", 100.0 * share)
}

/// A line on a terminal that says what goes on and vanishes when it is over; nothing where stderr is not a terminal.
pub struct Progress {
    on_terminal: bool,
    /// When the next line may come, had they all come in their time.
    due: Instant,
}

impl Progress {
    /// Nothing is shown yet.
    pub fn new() -> Progress {
        Progress { on_terminal: stderr().is_terminal() && !is_dumb(), due: Instant::now() }
    }

    /// Replaces the line, unless others have just been shown.
    pub fn show(&mut self, what: impl Display) {
        let now = Instant::now();
        if self.on_terminal && self.due < now + PAUSE * AT_ONCE {
            self.due = self.due.max(now) + PAUSE;
            self.replace(what);
        }
    }

    /// As [`Progress::show`], in any case, and a line where stderr is not a terminal: what may take seconds says first what it is.
    pub fn announce(&mut self, what: impl Display) {
        match self.on_terminal {
            true => self.replace(what),
            false => say(format_args!("{what}")),
        }
    }

    fn replace(&mut self, what: impl Display) {
        // What does not fit goes on in the next row, where nothing would remove it.
        let line = format!("{what} ...");
        write(&format!("{CLEAR}{}", cut(&line, columns())));
        SHOWN.store(true, Ordering::Relaxed);
    }

    /// Removes the line.
    pub fn clear(&mut self) {
        if SHOWN.swap(false, Ordering::Relaxed) {
            write(CLEAR);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

/// What fits into so many columns, of which the last stays free for the cursor. What is not ASCII may take two.
fn cut(line: &str, columns: u16) -> &str {
    let mut free = usize::from(columns).saturating_sub(1);
    let over = line.char_indices().find(|(_, c)| {
        let wide = if c.is_ascii() { 1 } else { 2 };
        free.checked_sub(wide).map(|left| free = left).is_none()
    });
    over.map_or(line, |(at, _)| &line[..at])
}

/// Columns of the terminal behind stderr, as it is now.
#[allow(unsafe_code)] // nix has it, but a feature for one call would be built for all.
fn columns() -> u16 {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request writes a `winsize` there, or nothing.
    let answered = unsafe { libc::ioctl(libc::STDERR_FILENO, libc::TIOCGWINSZ, &mut size) } == 0;
    if answered && size.ws_col > 0 { size.ws_col } else { USUAL_COLUMNS }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_to_the_terminal() {
        assert_eq!(cut("window 0 ...", 80), "window 0 ...");
        assert_eq!(cut("window 0 ...", 13), "window 0 ...");
        assert_eq!(cut("window 0 ...", 12), "window 0 ..");
        assert_eq!(cut("ab±c", 5), "ab±");
        assert_eq!(cut("ab±c", 4), "ab");
        assert_eq!(cut("ab", 0), "");
    }
}
