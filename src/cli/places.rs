//! Where a run may write: not over what it reads, and not twice in one place.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::ArgMatches;
use specache::error::{Error, Result};
use specache::eval::longbench::task;
use specache::model::folder;

/// Options that name a file to read.
const INPUTS: [&str; 5] = ["file", "tokens", "spec_tokens", "haystack", "prompts"];
/// Options that name a file to write. Where the values of one are no paths, it is a format.
const OUTPUTS: [&str; 4] = ["output", "trace_selections", "plot", "trace"];

/// Checks the files of a command, before any of them is opened: what is written is no file that is read, takes the name of
/// none in a folder that is read, and is not written by another option. Whatever a file is called, it is the same by what the system says of it.
///
/// # Errors
/// [`Error::Usage`] naming the options and the file.
pub fn check(matches: &ArgMatches) -> Result<()> {
    let command = innermost(matches);
    let given = |id: &&'static str| Some((option(id), command.try_get_one::<PathBuf>(id).ok()??.as_path()));
    let folders = folders(command);
    let mut taken: Vec<(String, Place)> =
        INPUTS.iter().filter_map(given).filter_map(|(option, file)| Some((option, Place::of(input(file))?))).collect();
    for (option, file) in OUTPUTS.iter().filter_map(given) {
        let Some(place) = Place::of(file) else { continue };
        if let Some((other, _)) = taken.iter().find(|(_, other)| *other == place) {
            let file = file.display();
            return Err(Error::Usage(format!(
                "{other} and {option} name the same file, {file}; name another one behind {option}"
            )));
        }
        if let Some(other) = folders.iter().find(|folder| place.is_read_from(folder)) {
            return Err(Error::Usage(format!(
                "{option} {}: is a file of {}, which {} reads; name a file elsewhere",
                file.display(),
                other.path.display(),
                other.option
            )));
        }
        taken.push((option, place));
    }
    Ok(())
}

fn innermost(matches: &ArgMatches) -> &ArgMatches {
    matches.subcommand().map_or(matches, |(_, matches)| innermost(matches))
}

fn option(id: &str) -> String {
    format!("--{}", id.replace('_', "-"))
}

fn input(file: &Path) -> &Path {
    if file == Path::new("-") { Path::new("/dev/stdin") } else { file }
}

/// A folder that a command reads.
struct Folder {
    option: String,
    path: PathBuf,
    /// Whether files of this name are read.
    reads: fn(&Path) -> bool,
}

/// The folders of a command. One that is not there is told when it is opened.
fn folders(command: &ArgMatches) -> Vec<Folder> {
    let models = command.try_get_many::<String>("model").ok().flatten().into_iter().flatten();
    let models = models.filter_map(|model| folder(model).ok().flatten());
    let models = models.map(|path| Folder { option: option("model"), path, reads: of_model });
    let data = command.try_get_one::<PathBuf>("data").ok().flatten();
    models.chain(data.map(|path| Folder { option: option("data"), path: path.clone(), reads: of_data })).collect()
}

/// Weights, configurations, tokenizers and templates.
fn of_model(file: &Path) -> bool {
    file.extension().is_some_and(|end| ["json", "safetensors", "jinja"].iter().any(|read| end == *read))
}

/// Tasks.
fn of_data(file: &Path) -> bool {
    file.file_stem().and_then(OsStr::to_str).is_some_and(|name| task(name).is_ok())
}

/// A file, whatever it is called.
#[derive(PartialEq)]
enum Place {
    /// Device and inode.
    There(u64, u64),
    /// No file yet.
    New(PathBuf),
}

impl Place {
    /// `None` for pipes and devices, where nothing is lost, and for what cannot be a file.
    fn of(file: &Path) -> Option<Place> {
        match fs::metadata(file) {
            Ok(meta) if meta.is_file() => Some(Place::There(meta.dev(), meta.ino())),
            Ok(_) => None,
            Err(_) => {
                let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
                Some(Place::New(folder.canonicalize().ok()?.join(file.file_name()?)))
            }
        }
    }

    /// Links in a folder, such as those of the Hugging Face cache, count as what they lead to.
    fn is_read_from(&self, folder: &Folder) -> bool {
        match self {
            Place::There(..) => {
                let files = fs::read_dir(&folder.path).into_iter().flatten().flatten().map(|entry| entry.path());
                files
                    .filter(|file| (folder.reads)(file))
                    .filter_map(|file| Place::of(&file))
                    .any(|place| place == *self)
            }
            Place::New(file) => {
                let lies_there = folder.path.canonicalize().is_ok_and(|folder| file.parent() == Some(&folder));
                lies_there && (folder.reads)(file)
            }
        }
    }
}
