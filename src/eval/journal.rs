//! A file of finished items, one JSON object a line, that a later run with the same options continues.
//!
//! ```text
//! {"specache_eval":"kld","options":{...}}
//! {"item":"window 0","result":{...}}
//! ```
//!
//! A line is written at once when its item is finished, and brought to the disk before the next one begins (an item takes
//! seconds, that takes milliseconds). So whatever ends the process leaves whole lines, and a machine that stops at most one
//! torn line at the end: it is cut off when the file is opened again, and its item is done anew.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::notice;

/// Finished items, in a file or in memory only.
pub struct Journal {
    file: Option<(File, PathBuf)>,
    done: HashMap<String, Value>,
    torn: usize,
}

impl Journal {
    /// Begins the file, or goes on with what a run of the same `command` and `options` has left in it. Without a path,
    /// nothing is kept. The file is locked for as long as this lives.
    ///
    /// # Errors
    /// [`Error::Usage`] for a file of other options (naming the first that differs), for one that is not such a file, and
    /// for one that another process writes; [`Error::Io`] naming the file. The file is as before then.
    pub fn open(path: Option<&Path>, command: &str, options: &Value) -> Result<Journal> {
        let Some(path) = path else { return Ok(Journal { file: None, done: HashMap::new(), torn: 0 }) };
        let mut file = open_locked(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
        let head = json!({ "specache_eval": command, "options": options });
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        // What is torn may end inside a character.
        let text = std::str::from_utf8(&bytes[..whole]).map_err(|_| foreign(path, "it is not text"))?;
        let mut lines = text.lines();
        let done = match lines.next() {
            Some(first) => {
                check_head(path, first, command, options)?;
                items(path, lines)?
            }
            // Nothing, or the beginning of a first line.
            None if format!("{head}\n").as_bytes().starts_with(&bytes) => HashMap::new(),
            None => return Err(foreign(path, "its first line is not that of an evaluation")),
        };
        let mut journal = Journal { file: Some((file, path.to_owned())), done, torn: bytes.len() - whole };
        journal.cut(whole as u64)?;
        if whole == 0 {
            journal.write(&head)?;
            sync_folder(path);
        }
        Ok(journal)
    }

    /// Bytes of a torn last line that were cut off.
    pub fn torn(&self) -> usize {
        self.torn
    }

    /// How many items are finished.
    pub fn len(&self) -> usize {
        self.done.len()
    }

    /// Whether no item is finished.
    pub fn is_empty(&self) -> bool {
        self.done.is_empty()
    }

    /// The result of an item, if it is finished.
    pub fn get(&self, item: &str) -> Option<&Value> {
        self.done.get(item)
    }

    /// Keeps the result of an item, in the file if there is one. Returns it as a later run will read it: numbers go through
    /// their text, so that a run in two parts gives the figures of one without a break.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn add(&mut self, item: &str, result: &Value) -> Result<Value> {
        let line = json!({ "item": item, "result": result });
        self.write(&line)?;
        let mut read: Value = serde_json::from_str(&line.to_string()).expect("it was JSON");
        let result = read["result"].take();
        self.done.insert(item.into(), result.clone());
        Ok(result)
    }

    /// One call of the system for the whole line: an interrupt comes before it or after it. Then it goes to the disk.
    fn write(&mut self, line: &Value) -> Result<()> {
        let Some((file, path)) = &mut self.file else { return Ok(()) };
        let written = file.write_all(format!("{line}\n").as_bytes()).and_then(|()| file.sync_data());
        written.map_err(|e| Error::io(&*path, e))
    }

    fn cut(&mut self, length: u64) -> Result<()> {
        let Some((file, path)) = &mut self.file else { return Ok(()) };
        let cut = file.set_len(length).and_then(|()| file.seek(SeekFrom::End(0)));
        cut.map(|_| ()).map_err(|e| Error::io(&*path, e))
    }
}

/// Brings a new file's name to the disk. Some file systems refuse that for folders, and bring names there by themselves.
fn sync_folder(file: &Path) {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
}

/// Whether such a file can be at this place, so that it is known before any work is done.
///
/// # Errors
/// [`Error::Usage`] for a folder, a folder that is not there, and what is not a regular file.
pub fn check_place(path: &Path) -> Result<()> {
    let usage = |what: &str| Err(Error::Usage(format!("--output {}: {what}", path.display())));
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    if path.is_dir() {
        return usage("is a folder, not a file");
    }
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        return usage(&format!("there is no folder {}; make it, or name a file elsewhere", folder.display()));
    }
    if path.exists() && !path.is_file() {
        return usage("is not a regular file, so that no later run could continue it");
    }
    Ok(())
}

fn open_locked(path: &Path) -> Result<File> {
    check_place(path)?;
    let usage = |what: &str| Err(Error::Usage(format!("--output {}: {what}", path.display())));
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
    let file = file.map_err(|e| Error::io(path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => usage("another run is writing it; wait for its end, or name another file"),
        // Some network file systems have no locks.
        Err(TryLockError::Error(why)) => {
            let path = path.display();
            notice::warn(format_args!(
                "--output {path}: cannot be locked ({why}); let no other run write it at the same time"
            ));
            Ok(file)
        }
    }
}

fn foreign(path: &Path, why: &str) -> Error {
    let path = path.display();
    Error::Usage(format!(
        "--output {path}: not a file of `eval` ({why}), and nothing is overwritten; name another file"
    ))
}

/// Whether a first line is that of this command with these options.
fn check_head(path: &Path, line: &str, command: &str, options: &Value) -> Result<()> {
    let head: Value = serde_json::from_str(line).map_err(|_| foreign(path, "its first line is not JSON"))?;
    let Some(of) = head["specache_eval"].as_str() else {
        return Err(foreign(path, "its first line is not that of an evaluation"));
    };
    let other = |what: String| {
        let path = path.display();
        Error::Usage(format!(
            "--output {path}: was written with other options: {what}; use the same, or name another file"
        ))
    };
    if of != command {
        return Err(other(format!("it is of `eval {of}`, this is `eval {command}`")));
    }
    let all = differences(&head["options"], options);
    // A hash of what was read differs by the options for it, too.
    let told = all.iter().find(|what| !what.ends_with(ANOTHER)).or(all.first());
    told.map_or(Ok(()), |what| Err(other(what.clone())))
}

/// What is said of a hash, which tells nobody anything.
const ANOTHER: &str = "is another one";

/// What differs, with the names on the way to it: `model config.json is another one`, `windows was 2, is 3`.
fn differences(was: &Value, is: &Value) -> Vec<String> {
    let is_hash = |value: &Value| {
        value.as_str().is_some_and(|text| text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    match (was.as_object(), is.as_object()) {
        _ if was == is => Vec::new(),
        (Some(old), Some(new)) => {
            let names = new.keys().chain(old.keys().filter(|&name| !new.contains_key(name)));
            let of = |name: &String| differences(&was[name], &is[name]).iter().map(|d| format!("{name} {d}")).collect();
            names.flat_map::<Vec<String>, _>(of).collect()
        }
        _ if is_hash(was) && is_hash(is) => vec![ANOTHER.into()],
        _ => vec![format!("was {was}, is {is}")],
    }
}

fn items<'a>(path: &Path, lines: impl Iterator<Item = &'a str>) -> Result<HashMap<String, Value>> {
    let mut done = HashMap::new();
    for (i, line) in lines.enumerate() {
        let wrong = |what: &str| {
            let (path, line) = (path.display(), i + 2);
            Error::Usage(format!("--output {path}: line {line} {what}; remove that line, or name another file"))
        };
        let mut read: Value = serde_json::from_str(line).map_err(|_| wrong("is not JSON"))?;
        let Some(item) = read["item"].as_str().map(str::to_owned) else { return Err(wrong("names no item")) };
        if read["result"].is_null() {
            return Err(wrong("has no result"));
        }
        if done.insert(item, read["result"].take()).is_some() {
            return Err(wrong("is of an item that an earlier line has finished"));
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A folder of this test's own, which is removed with it.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("specache-journal-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir(&path).unwrap();
            Folder(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn open(path: &Path, options: &Value) -> Result<Journal> {
        Journal::open(Some(path), "kld", options)
    }

    #[test]
    fn a_second_run_finds_what_the_first_has_finished() {
        let folder = Folder::new("resume");
        let (path, options) = (folder.0.join("out.jsonl"), json!({"windows": 3}));
        let third = 1.0f64 / 3.0;
        let added = open(&path, &options).unwrap().add("window 0", &json!({"x": third})).unwrap();
        let again = open(&path, &options).unwrap();
        assert_eq!((again.len(), again.torn(), again.get("window 0")), (1, 0, Some(&added)));
        assert_eq!(again.get("window 1"), None);
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 2);
    }

    /// Cut off after any byte, be it inside a character, the file is continued, and then holds what it would have held.
    #[test]
    fn a_torn_line_is_cut_off_wherever_it_was_torn() {
        let folder = Folder::new("torn");
        let (path, options) = (folder.0.join("out.jsonl"), json!({"windows": 2, "name": "é"}));
        let items = [("a", json!("é")), ("b", json!("→ 2"))];
        let mut journal = open(&path, &options).unwrap();
        items.iter().for_each(|(item, result)| drop(journal.add(item, result).unwrap()));
        drop(journal);
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let mut journal = open(&path, &options).unwrap();
            let lines = whole[..length].iter().filter(|&&b| b == b'\n').count();
            assert_eq!(journal.len(), lines.saturating_sub(1), "{length} bytes");
            for (item, result) in &items {
                if journal.get(item).is_none() {
                    journal.add(item, result).unwrap();
                }
            }
            drop(journal);
            assert_eq!(fs::read(&path).unwrap(), whole, "{length} bytes");
        }
    }

    #[test]
    fn files_that_do_not_belong_are_left_alone() {
        let folder = Folder::new("foreign");
        let path = folder.0.join("out.jsonl");
        let options = json!({"windows": 2, "kv": ["full"]});
        open(&path, &options).unwrap().add("a", &json!(1)).unwrap();
        let kept = fs::read_to_string(&path).unwrap();
        let refused = |path: &Path, command: &str, options: &Value, word: &str| {
            let before = fs::read(path).ok();
            let error = Journal::open(Some(path), command, options).err().expect("it is refused");
            assert_eq!(error.exit_code(), 2, "{error}");
            assert!(error.to_string().contains(word), "{error}");
            assert_eq!(fs::read(path).ok(), before);
        };
        refused(&path, "ppl", &options, "it is of `eval kld`");
        refused(&path, "kld", &json!({"windows": 3, "kv": ["full"]}), "windows was 2, is 3");
        refused(&path, "kld", &json!({"windows": 2}), "kv was [\"full\"], is null");
        let holder = open(&path, &options).unwrap();
        refused(&path, "kld", &options, "another run");
        drop(holder);
        for (text, word) in [
            ("{}\n", "not that of an evaluation"),
            ("notes\n", "is not JSON"),
            ("notes", "not that of an evaluation"),
            (&format!("{kept}oops\n"), "line 3 is not JSON"),
            (&format!("{kept}{{\"item\":\"a\",\"result\":1}}\n"), "line 3 is of an item"),
            (&format!("{kept}{{\"item\":\"b\"}}\n"), "line 3 has no result"),
        ] {
            fs::write(&path, text).unwrap();
            refused(&path, "kld", &options, word);
        }
        fs::write(&path, [0xff, 0xfe, b'\n']).unwrap();
        refused(&path, "kld", &options, "not text");
        refused(&folder.0, "kld", &options, "is a folder");
        refused(&folder.0.join("no/out.jsonl"), "kld", &options, "there is no folder");
        refused(Path::new("/dev/null"), "kld", &options, "not a regular file");
    }
}
