//! The one error type of the library, and the exit code that each kind of error has on the command line.

use std::path::{Path, PathBuf};

/// What went wrong, in words that name the thing and the fix.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller asked for something that cannot be: an option, a token id, a combination. Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// A model folder, or a file in it, that cannot be used. `what` names the field or tensor and the fix. Exit code 3.
    #[error("{}: {what}", file.display())]
    Model {
        /// The file or folder at fault.
        file: PathBuf,
        /// Which field or tensor is wrong, and what would be right.
        what: String,
    },
    /// A memory budget that a request does not fit in, found by arithmetic before anything is allocated; or memory that the
    /// system refuses though the budgets have room. Exit code 4.
    #[error("out of {memory} memory: {what} needs {needed} bytes, {available} bytes are available; {fix}")]
    OutOfMemory {
        /// `device`, `host` or `system`.
        memory: &'static str,
        /// What was to be placed there.
        what: String,
        /// Bytes that it needs.
        needed: u64,
        /// Bytes that were left; 0 where the system refuses and does not say.
        available: u64,
        /// What the user can change.
        fix: String,
    },
    /// NaN or infinity where numbers belong; the request that met it fails, others go on. Exit code 1.
    #[error("{0}")]
    NotFinite(String),
    /// A copy between host and device, or the device itself, failed; the request that needed it fails. Exit code 5.
    #[error("{0}")]
    Device(String),
    /// Reading or writing a file failed. Exit code 1.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Ctrl-C. Exit code 130.
    #[error("interrupted")]
    Interrupted,
}

/// `Result` with the library's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A model file that cannot be used. `what` may quote it: see [`presentable`].
    pub fn model(file: impl AsRef<Path>, what: impl AsRef<str>) -> Self {
        Error::Model { file: file.as_ref().to_owned(), what: presentable(what.as_ref()) }
    }

    /// A failed read or write of `file`.
    pub fn io(file: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { file: file.as_ref().to_owned(), source }
    }

    /// The exit code of the command line: 1 failure, 2 usage, 3 model invalid, 4 out of memory, 5 device or copy
    /// failed, 130 interrupted.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Io { .. } | Error::NotFinite(_) => 1,
            Error::Usage(_) => 2,
            Error::Model { .. } => 3,
            Error::OutOfMemory { .. } => 4,
            Error::Device(_) => 5,
            Error::Interrupted => 130,
        }
    }
}

/// A message that quotes a file of unknown origin, so that it neither floods nor steers a terminal: control characters are
/// written as `\u{1b}`, and what is longer than any message of ours loses its middle.
pub(crate) fn presentable(text: &str) -> String {
    const END: usize = 500;
    let shown = |c: char| if c.is_control() && c != '\n' { c.escape_unicode().to_string() } else { c.to_string() };
    let count = text.chars().count();
    if count <= 2 * END {
        return text.chars().map(shown).collect();
    }
    let (head, tail) = (text.chars().take(END), text.chars().skip(count - END));
    head.map(shown).chain([" ... ".to_string()]).chain(tail.map(shown)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_neither_flood_nor_steer_a_terminal() {
        let text = |what: &str| Error::model("f", what).to_string();
        assert_eq!(text("tensor \u{1b}[2J\r is é,\nbad"), "f: tensor \\u{1b}[2J\\u{d} is é,\nbad");
        let long = text(&format!("begin {} end", "x".repeat(1 << 20)));
        assert!(long.len() < 1100 && long.starts_with("f: begin xx") && long.ends_with("xx end"), "{long}");
    }
}
