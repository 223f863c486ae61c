//! What is written: stdout, files that appear whole or not at all, NPY, tables.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use specache::device::Device;
use specache::device::interrupt::{self, Unfinished};
use specache::device::trace::{Slice, write_chrome};
use specache::error::{Error, Result};

/// What stdout is called in an [`Error::Io`].
pub const STDOUT: &str = "standard output";

/// Whether a line on stdout has begun and not ended.
static IN_LINE: AtomicBool = AtomicBool::new(false);

/// Whether a line on stdout waits for its end, which the caller writes.
pub fn end_line() -> bool {
    IN_LINE.swap(false, Ordering::Relaxed)
}

/// Writes to stdout at once.
///
/// # Errors
/// [`Error::Io`] on [`STDOUT`].
pub fn print(text: &str) -> Result<()> {
    if !text.is_empty() {
        IN_LINE.store(!text.ends_with('\n'), Ordering::Relaxed);
    }
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| Error::io(STDOUT, e))
}

/// A file that gets its name when it is complete. Until then it lies beside it under another name, and is removed if
/// anything goes wrong. What exists and is not a regular file (a pipe, `/dev/stdout`) is written directly.
pub struct AtomicFile {
    target: PathBuf,
    /// `None`: written directly, or complete.
    temporary: Option<PathBuf>,
    out: Option<BufWriter<File>>,
    /// Ctrl-C, too, leaves nothing that is not complete.
    _unfinished: Option<Unfinished>,
}

impl AtomicFile {
    /// Begins the file that `option` names, so that a place where it cannot be is known before any work is done.
    ///
    /// # Errors
    /// [`Error::Usage`] for a folder, and for a folder that is not there; [`Error::Io`] naming the target.
    pub fn create(option: &str, target: &Path) -> Result<AtomicFile> {
        let failed = |e| Error::io(target, e);
        let usage = |what: String| Err(Error::Usage(format!("{option} {}: {what}", target.display())));
        let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
        let (path, temporary) = match fs::metadata(target) {
            Ok(meta) if meta.is_dir() => return usage("is a folder, not a file".into()),
            Err(_) if folder.is_some_and(|folder| !folder.is_dir()) => {
                let folder = folder.expect("just looked at").display();
                return usage(format!("there is no folder {folder}; make it, or name a file elsewhere"));
            }
            Ok(meta) if !meta.is_file() => (target.to_owned(), None),
            // Through a link to what it names, which then stays a link.
            Ok(_) => beside(&target.canonicalize().map_err(failed)?),
            Err(_) => beside(target),
        };
        let unfinished = temporary.as_deref().map(interrupt::unfinished);
        let file = match &temporary {
            Some(temporary) => File::create_new(temporary),
            None => File::options().write(true).open(&path),
        };
        let out = Some(BufWriter::new(file.map_err(failed)?));
        Ok(AtomicFile { target: path, temporary, out, _unfinished: unfinished })
    }

    /// Appends.
    ///
    /// # Errors
    /// [`Error::Io`] naming the target.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let out = self.out.as_mut().expect("open until it is committed");
        out.write_all(bytes).map_err(|e| Error::io(&self.target, e))
    }

    /// Writes what is buffered: after this, only the name is missing.
    ///
    /// # Errors
    /// As [`AtomicFile::write`].
    pub fn flush(&mut self) -> Result<()> {
        self.out.as_mut().expect("open until it is committed").flush().map_err(|e| Error::io(&self.target, e))
    }

    /// The file is complete and gets its name.
    ///
    /// # Errors
    /// As [`AtomicFile::write`].
    pub fn commit(mut self) -> Result<()> {
        self.flush()?;
        if let Some(temporary) = self.temporary.take() {
            fs::rename(&temporary, &self.target).map_err(|e| {
                let _ = fs::remove_file(&temporary);
                Error::io(&self.target, e)
            })?;
        }
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // What is buffered is not wanted any more.
            drop(self.out.take().map(BufWriter::into_parts));
            let _ = fs::remove_file(temporary);
        }
    }
}

/// Writes what an engine's streams did into the file of `--trace`, whatever the outcome of the run: of one that failed
/// it shows how far it came. `slices`: what has been taken from the trace already.
///
/// # Errors
/// The run's own; else as [`AtomicFile::write`].
pub fn traced<T>(file: Option<AtomicFile>, device: &Device, mut slices: Vec<Slice>, outcome: Result<T>) -> Result<T> {
    let written = file.zip(device.trace()).map_or(Ok(()), |(mut file, trace)| {
        device.finish_trace();
        slices.extend(trace.take());
        let mut text = Vec::new();
        write_chrome(&slices, &mut text).expect("memory takes everything");
        file.write(&text)?;
        file.commit()
    });
    let outcome = outcome?;
    written.map(|()| outcome)
}

/// A target and a temporary name in its folder, so that renaming never copies.
fn beside(target: &Path) -> (PathBuf, Option<PathBuf>) {
    let mut name = std::ffi::OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(format!(".{}.tmp", std::process::id()));
    (target.to_owned(), Some(target.with_file_name(name)))
}

/// The head of a NPY file, version 1.0: little-endian float32, C order. Its length is a multiple of 64.
pub fn npy_header(rows: usize, cols: usize) -> Vec<u8> {
    let dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    let before = 10; // magic, version, length
    let padded = (before + dict.len() + 1).next_multiple_of(64) - before;
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((padded as u16).to_le_bytes());
    header.extend(format!("{dict:<width$}\n", width = padded - 1).into_bytes());
    header
}

/// A table in Markdown with aligned columns: the first to the left, numbers to the right.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let cells = |column: usize| rows.iter().map(move |row| row[column].as_str());
    let width = |column: usize| cells(column).chain([header[column]]).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).enumerate().map(|(i, (cell, &width))| match i {
            0 => format!(" {cell:<width$} |"),
            _ => format!(" {cell:>width$} |"),
        });
        format!("|{}\n", padded.collect::<String>())
    };
    let rule =
        widths.iter().enumerate().map(|(i, w)| format!("{}{}|", "-".repeat(w + 1), if i == 0 { "-" } else { ":" }));
    let rule = format!("|{}\n", rule.collect::<String>());
    let body = rows.iter().map(|row| line(row.iter().map(String::as_str).collect()));
    [line(header.to_vec()), rule].into_iter().chain(body).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn npy_header_is_padded() {
        let header = npy_header(100, 1536);
        assert_eq!(header.len() % 64, 0);
        assert_eq!(header.last(), Some(&b'\n'));
        assert_eq!(u16::from_le_bytes([header[8], header[9]]) as usize, header.len() - 10);
    }

    #[test]
    fn tables_are_aligned() {
        let text = table(&["mode", "x"], &[vec!["full".into(), "1".into()], vec!["specache".into(), "12 ± 3".into()]]);
        let expected = "| mode     |      x |\n|----------|-------:|\n| full     |      1 |\n| specache | 12 ± 3 |\n";
        assert_eq!(text, expected);
    }
}
