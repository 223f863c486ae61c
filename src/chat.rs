//! Chat templates: messages become the prompt text that a model was trained on, by the Jinja template of its folder.

use std::io;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value, context};
use minijinja_contrib::pycompat;
use serde::Serialize as _;
use serde_json::ser::Formatter;

use crate::error::{Error, Result, presentable};
use crate::model::fields::read_text;

/// Bounds a template's time and memory: about 64 bytes or one instruction each. Published templates take some hundred per
/// message and a unit per 64 bytes of it, so that a conversation of 10 MB passes, an endless loop ends at once, and what grows
/// without an end within seconds.
const FUEL: u64 = 1_000_000;

/// Room for the calls that a template can nest: a list in a list costs some units of fuel, and writing or dropping it a stack
/// frame. It is taken as it is used.
const STACK: usize = 512 << 20;

/// Most bytes of a value as JSON, which fuel does not pay for: more than any context holds.
const MOST_JSON: usize = 16 << 20;

/// One message of a conversation.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// `system`, `user`, `assistant` or what else the template knows.
    pub role: &'a str,
    /// Its text.
    pub content: &'a str,
}

/// The chat template of a model folder.
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
    file: PathBuf,
    /// Of `tokenizer_config.json`; templates write them themselves.
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja` of a model folder, else `chat_template` of its `tokenizer_config.json`; `None` where there
    /// is neither.
    ///
    /// # Errors
    /// [`Error::Model`] naming file and line for what is not a template.
    pub fn load(dir: &Path) -> Result<Option<ChatTemplate>> {
        let config_file = dir.join("tokenizer_config.json");
        let config = match read_text(&config_file)? {
            Some(json) => serde_json::from_str(&json)
                .map_err(|e| Error::model(&config_file, format!("not valid JSON: {e}; download the file again")))?,
            None => serde_json::Value::Null,
        };
        let file = dir.join("chat_template.jinja");
        let (source, file) = match read_text(&file)? {
            Some(source) => (source, file),
            None => match in_config(&config, &config_file)? {
                Some(source) => (source, config_file),
                None => return Ok(None),
            },
        };
        let template = ChatTemplate {
            source,
            file,
            bos_token: token(&config["bos_token"]),
            eos_token: token(&config["eos_token"]),
        };
        on_deep_stack(|| environment().template_from_str(&template.source).map(drop).map_err(|e| template.error(e)))??;
        Ok(Some(template))
    }

    /// The text of a conversation, with the first special tokens written out: tokenise it without adding any. With
    /// `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// [`Error::Usage`] for no messages, and for those that the template refuses, in its own words; [`Error::Model`] for a
    /// template that fails, or works for too long.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        if messages.is_empty() {
            return Err(Error::Usage("a chat without messages: at least one is needed".into()));
        }
        on_deep_stack(|| self.render_here(messages, add_generation_prompt))?
    }

    fn render_here(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let environment = environment();
        let template = environment.template_from_str(&self.source).map_err(|e| self.error(e))?;
        let (bos_token, eos_token) = (self.bos_token.as_deref(), self.eos_token.as_deref());
        let given = context! { messages => values(messages), add_generation_prompt, bos_token => bos_token.unwrap_or_default(),
        eos_token => eos_token.unwrap_or_default() };
        template.render(given).map_err(|e| match refusal(&e) {
            Some(why) => Error::Usage(presentable(&format!("the chat template refuses these messages: {why}"))),
            None => self.error(e),
        })
    }

    fn error(&self, fault: minijinja::Error) -> Error {
        let what = match fault.kind() {
            ErrorKind::OutOfFuel => "the chat template works for too long; is there a loop without an end?".to_string(),
            _ => format!("the chat template failed: {fault}"),
        };
        Error::model(&self.file, what)
    }
}

/// Runs `work` on a thread with [`STACK`] bytes of stack: whoever calls may have little, and templates are strangers' programs.
///
/// # Errors
/// [`Error::Device`] if the system refuses the thread.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    let refused =
        |e| Error::Device(format!("no thread for the chat template: {e}; raise the limits on memory and processes"));
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("template".into()).stack_size(STACK).spawn_scoped(scope, work);
        let done = thread.map_err(refused)?.join();
        done.map_err(|_| Error::Device("the chat template made a thread panic".into()))
    })
}

fn values(messages: &[Message]) -> Vec<Value> {
    messages.iter().map(|m| Value::from_pairs([("role", m.role), ("content", m.content)])).collect()
}

/// `chat_template` of `tokenizer_config.json`: a text, or several with names, of which `default` is meant.
fn in_config(config: &serde_json::Value, file: &Path) -> Result<Option<String>> {
    match &config["chat_template"] {
        serde_json::Value::Null => Ok(None),
        serde_json::Value::String(source) => Ok(Some(source.clone())),
        serde_json::Value::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str());
            let source =
                default.ok_or_else(|| Error::model(file, "field chat_template has no template named default"))?;
            Ok(Some(source.to_string()))
        }
        _ => Err(Error::model(file, "field chat_template must be a text, or a list of templates with names")),
    }
}

/// A special token: its text, or an object with it.
fn token(value: &serde_json::Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_string)
}

/// As Hugging Face transformers sets Jinja up.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the usual delimiters"));
    environment.set_unknown_method_callback(|state, value, method, arguments| match (method, value.as_str()) {
        ("format", Some(text)) if wide(text) => {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, "a field is too wide"))
        }
        _ => pycompat::unknown_method_callback(state, value, method, arguments),
    });
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |why: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, why.clone()).with_source(Refusal(why)))
    });
    environment
}

/// Whether a format has a width or precision that no text needs: `{:>9999999999}`. Fuel is not asked to pay for them.
fn wide(format: &str) -> bool {
    let specs = format.split('{').skip(1).filter_map(|field| field.split('}').next()?.split_once(':'));
    let mut numbers = specs.flat_map(|(_, spec)| spec.split(|c: char| !c.is_ascii_digit()));
    numbers.any(|number| number.trim_start_matches('0').len() > 4)
}

/// `raise_exception`: the template does not take these messages.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn refusal(fault: &minijinja::Error) -> Option<&str> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(fault);
    while let Some(error) = cause {
        if let Some(Refusal(why)) = error.downcast_ref() {
            return Some(why);
        }
        cause = error.source();
    }
    None
}

/// Python's `json.dumps` with `ensure_ascii=False`; minijinja's own filter escapes what HTML would misread.
fn to_json(value: Value, arguments: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    let _ascii: Option<bool> = arguments.get("ensure_ascii")?; // false is what is done
    arguments.assert_all_used()?;
    let wrong = |e| minijinja::Error::new(ErrorKind::BadSerialization, "not possible as JSON").with_source(e);
    let mut text = Limited(Vec::new());
    match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, Spaced)).map_err(wrong)?,
        Some(n) => {
            let indent = " ".repeat(n.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, pretty)).map_err(wrong)?;
        }
    }
    Ok(Value::from(String::from_utf8_lossy(&text.0).into_owned()))
}

/// A text that ends. Lists of lists that share their parts are small, and endless when written out.
struct Limited(Vec<u8>);

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MOST_JSON {
            return Err(io::Error::other("the text is too long"));
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A space behind commas and colons, as Python writes JSON.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}
