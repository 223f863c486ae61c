//! What the user gives: prompts and lists of token ids, checked before any work begins.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use specache::chat::ChatTemplate;
use specache::error::{Error, Result};
use specache::model::folder;
use specache::tokenizer::{self, Tokenizer};

use super::progress::say;
use super::shared_args::PromptArgs;

/// The tokenizer of a model; `None` for a folder without one and for random weights.
///
/// # Errors
/// [`Error::Model`] for a file that is not a tokenizer, or belongs to another model.
pub fn tokenizer(model: &str, vocab_size: usize) -> Result<Option<Tokenizer>> {
    let Some(folder) = folder(model)? else { return Ok(None) };
    let tokenizer = Tokenizer::load(&folder)?;
    if let Some(tokenizer) = &tokenizer {
        tokenizer.check_vocab(vocab_size)?;
    }
    Ok(tokenizer)
}

/// The chat template of a model; `None` for a folder without one and for random weights.
///
/// # Errors
/// As [`ChatTemplate::load`].
pub fn template(model: &str) -> Result<Option<ChatTemplate>> {
    Ok(folder(model)?.map(|folder| ChatTemplate::load(&folder)).transpose()?.flatten())
}

/// A warning for a `tokenizer_config.json` that is no JSON: a text needs none of it, but other files may have suffered, too.
///
/// # Errors
/// As [`folder`].
pub fn warn_of_damage(model: &str) -> Result<()> {
    let file = folder(model)?.map(|folder| folder.join("tokenizer_config.json")).filter(|file| file.is_file());
    if let Some((file, why)) = file.and_then(|file| {
        let text = read(&file).ok()?;
        serde_json::from_slice::<serde::de::IgnoredAny>(&text).err().map(|why| (file, why))
    }) {
        say(format_args!("warning: {}: not valid JSON: {why}; download the file again", file.display()));
    }
    Ok(())
}

/// What the prompt is made from.
pub enum Source {
    /// Text, for the tokenizer.
    Text(String),
    /// Token ids, from which file.
    Ids(Vec<u32>),
}

/// Reads the prompt. Needs no model, so that mistakes show before one is loaded.
///
/// # Errors
/// [`Error::Usage`] for no prompt, several, an empty one, text that is not UTF-8, a bad list of ids; [`Error::Io`] for a
/// file that cannot be read.
pub fn prompt(args: &PromptArgs) -> Result<Source> {
    let usage = |what: String| Err(Error::Usage(what));
    let source = match (&args.prompt, &args.file, &args.tokens) {
        (Some(text), None, None) => Source::Text(text.clone()),
        (None, Some(file), None) => Source::Text(not_empty("-f", file)?),
        (None, None, Some(file)) => Source::Ids(ids("--tokens", file)?),
        (None, None, None) => return usage("no prompt: give one of -p/--prompt, -f/--file or --tokens".into()),
        _ => return usage("several prompts: give only one of -p/--prompt, -f/--file and --tokens".into()),
    };
    match &source {
        Source::Text(text) if text.is_empty() => usage("the prompt is empty: at least one token is needed".into()),
        Source::Ids(ids) if ids.is_empty() => usage("--tokens: the list is empty: at least one is needed".into()),
        _ => Ok(source),
    }
}

/// A text file with some text.
///
/// # Errors
/// As [`text`]; [`Error::Usage`] for an empty one.
pub fn not_empty(option: &str, file: &Path) -> Result<String> {
    let text = text(option, file)?;
    if text.is_empty() {
        return Err(Error::Usage(format!("{option} {}: the file is empty", file.display())));
    }
    Ok(text)
}

/// A text file.
///
/// # Errors
/// [`Error::Usage`] for text that is not UTF-8, and as [`read`].
pub fn text(option: &str, file: &Path) -> Result<String> {
    String::from_utf8(read_for(option, file)?).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::Usage(format!("{option} {}: byte {at} is not valid UTF-8; convert the file", file.display()))
    })
}

/// A file with a JSON array of token ids.
///
/// # Errors
/// [`Error::Usage`] naming the first entry that is not an id.
pub fn ids(option: &str, file: &Path) -> Result<Vec<u32>> {
    tokenizer::ids_of_json(&read_for(option, file)?)
        .map_err(|what| Error::Usage(format!("{option} {}: {what}", file.display())))
}

/// Checks ids against a model.
///
/// # Errors
/// [`Error::Usage`] naming the first entry beyond the vocabulary.
pub fn check_ids(option: &str, ids: &[u32], vocab_size: usize) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(i) => {
            let (id, last) = (ids[i], vocab_size - 1);
            Err(Error::Usage(format!(
                "{option}: entry {i} is {id}, beyond this model's vocabulary, which ends at {last}"
            )))
        }
    }
}

/// Most bytes of a text: some 50 million tokens. What is longer is another kind of file, or one without an end.
const MOST_BYTES: u64 = 256 << 20;

/// The bytes of a file that an option names, as its errors do.
///
/// # Errors
/// As [`read`].
pub fn read_for(option: &str, file: &Path) -> Result<Vec<u8>> {
    read(file).map_err(|why| match why {
        Error::Io { file, source } => Error::io(format!("{option} {}", file.display()), source),
        why => why,
    })
}

/// The bytes of a file.
///
/// # Errors
/// [`Error::Io`] for one that cannot be read; [`Error::Usage`] for one of more than 256 MiB, or without an end.
pub fn read(file: &Path) -> Result<Vec<u8>> {
    let failed = |e| Error::io(file, e);
    let mut bytes = Vec::new();
    let from: Box<dyn Read> = match file == Path::new("-") {
        true => Box::new(std::io::stdin().lock()),
        false => Box::new(File::open(file).map_err(failed)?),
    };
    from.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(Error::Usage(format!("{}: more than {MOST_BYTES} bytes are no text to read", file.display())));
    }
    Ok(bytes)
}
