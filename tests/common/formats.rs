//! What must hold for every input of a format that strangers write: no panic, little memory, little time, and an error of the
//! right kind that names the file and fits a terminal. Shared by tests/fuzz.rs and the targets in fuzz/.
//!
//! A format more is a function here, a line in [`ALL`], a folder of seeds in tests/fixtures/fuzz/ and a file in fuzz/targets/.
#![allow(dead_code)] // A target uses its own part.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Once, OnceLock};
use std::time::{Duration, Instant};
use std::{env, fs, panic, process};

use serde_json::json;
use specache::Error;
use specache::chat::{ChatTemplate, Message};
use specache::engine;
use specache::eval::longbench;
use specache::kv::{KvMode, KvOptions};
use specache::model::{GenerationConfig, Matrix, Model, RopeTable, config_of};
use specache::tokenizer::{Tokenizer, ids_of_json, is_guarded};

/// A format: its name, what is tried, and how much memory one input may take beside 200 bytes for each of its own (a JSON
/// value of two bytes is 32 in memory, in a list that doubles).
pub struct Format {
    pub name: &'static str,
    try_it: fn(&Path, &[u8]),
    most_bytes: usize,
}

pub const ALL: [&Format; 7] = [&CONFIG, &WEIGHTS, &INDEX, &TOKENIZER, &IDS, &CHAT_TEMPLATE, &LONGBENCH];
pub static CONFIG: Format = Format { name: "config", try_it: config, most_bytes: 4 << 20 };
pub static WEIGHTS: Format = Format { name: "weights", try_it: weights, most_bytes: 4 << 20 };
pub static INDEX: Format = Format { name: "index", try_it: index, most_bytes: 4 << 20 };
pub static TOKENIZER: Format = Format { name: "tokenizer", try_it: tokenizer, most_bytes: 128 << 20 };
pub static IDS: Format = Format { name: "ids", try_it: ids, most_bytes: 16 << 20 };
/// The fuel of a template pays for 64 MB of text, in several places at once, and a vector that grows has twice its own.
pub static CHAT_TEMPLATE: Format = Format { name: "chat_template", try_it: chat_template, most_bytes: 1 << 30 };
/// ROUGE-L keeps four bytes for each word of the longest true answer and each of what was said: 32,768 by 512.
pub static LONGBENCH: Format = Format { name: "longbench", try_it: questions, most_bytes: 80 << 20 };

/// Most time that one input may take.
const MOST_TIME: Duration = Duration::from_secs(20);

/// Tries one input.
pub fn run(format: &Format, data: &[u8]) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        // libFuzzer's ends the process, and the usual one prints.
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !is_guarded() {
                hook(panic)
            }
        }));
    });
    let folder = scratch(format.name);
    let (start, before) = (computed(), LIVE.get());
    PEAK.set(before);
    (format.try_it)(&folder, data);
    let taken = PEAK.get().saturating_sub(before) as usize;
    let most = format.most_bytes + 200 * data.len();
    assert!(taken <= most, "{}: {} bytes of input took {taken} of memory", format.name, data.len());
    let time = computed() - start;
    assert!(time < MOST_TIME, "{}: {time:?}", format.name);
}

/// Time that this thread has computed; the time of day where the system does not say.
fn computed() -> Duration {
    static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    let stat = fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = stat.and_then(|stat| stat.split(' ').next()?.parse().ok());
    nanoseconds.map_or_else(|| BEGIN.elapsed(), Duration::from_nanos)
}

/// The model folder of this thread, which holds what the format needs beside the input.
fn scratch(format: &str) -> PathBuf {
    let thread = format!("{:?}", std::thread::current().id()).replace(|c: char| !c.is_ascii_digit(), "");
    let folder = env::temp_dir().join(format!("specache-fuzz-{}-{thread}-{format}", process::id()));
    if !folder.is_dir() {
        fs::create_dir_all(&folder).unwrap();
        if ["weights", "index"].contains(&format) {
            fs::write(folder.join("config.json"), SMALL.to_string()).unwrap();
        }
        if format == "index" {
            let shapes = shapes();
            let (a, b) = shapes.split_at(shapes.len() / 2);
            fs::write(folder.join("a.safetensors"), file(&header(a), &[0; 4096])).unwrap();
            fs::write(folder.join("b.safetensors"), file(&header(b), &[0; 4096])).unwrap();
        }
    }
    folder
}

/// An error about `name`, a model's file, whose fault it is.
#[track_caller]
fn names(error: &Error, name: &str) {
    blames(error, 3, name);
}

#[track_caller]
fn blames(error: &Error, exit_code: u8, name: &str) {
    let text = error.to_string();
    assert_eq!(error.exit_code(), exit_code, "{text}");
    assert!(text.contains(name), "{name} is not in: {text}");
    assert!(text.len() < 9000 && !text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
}

// config.json and generation_config.json: one text as both.

fn config(folder: &Path, data: &[u8]) {
    fs::write(folder.join("config.json"), data).unwrap();
    fs::write(folder.join("generation_config.json"), data).unwrap();
    GenerationConfig::load(folder).map_or_else(|e| names(&e, "generation_config.json"), drop);
    let config = match config_of(folder.to_str().unwrap()) {
        Ok(config) => config,
        Err(error) => return names(&error, "config.json"),
    };
    let rope = RopeTable::new(&config);
    assert!(rope.inv_freq.iter().all(|f| f.is_finite()) && rope.attention_factor.is_finite(), "{config:?}");
    assert!(config.n_weights() > 0 && config.n_weights() < 1 << 62, "{config:?}");
    assert!(config.group_heads() * config.n_kv_heads == config.n_heads);
    for mode in KvMode::ALL {
        let kv = KvOptions { mode, ..KvOptions::default() };
        match engine::plan(&config, &kv, 1000) {
            Ok(bytes) => assert!(bytes.device() > 0 && bytes.device() < u64::MAX / 2, "{bytes:?}"),
            Err(error) => assert_eq!(error.exit_code(), 2, "{error}"),
        }
    }
}

// Safetensors.

static SMALL: LazyLock<serde_json::Value> = LazyLock::new(|| {
    json!({"model_type": "llama", "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
           "num_key_value_heads": 1, "vocab_size": 6, "tie_word_embeddings": true})
});

/// The tensors of the model of [`SMALL`].
fn shapes() -> Vec<(String, Vec<usize>)> {
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    vec![
        ("model.embed_tokens.weight".into(), vec![6, 8]),
        (layer("input_layernorm"), vec![8]),
        (layer("self_attn.q_proj"), vec![8, 8]),
        (layer("self_attn.k_proj"), vec![4, 8]),
        (layer("self_attn.v_proj"), vec![4, 8]),
        (layer("self_attn.o_proj"), vec![8, 8]),
        (layer("post_attention_layernorm"), vec![8]),
        (layer("mlp.gate_proj"), vec![4, 8]),
        (layer("mlp.up_proj"), vec![4, 8]),
        (layer("mlp.down_proj"), vec![8, 4]),
        ("model.norm.weight".into(), vec![8]),
    ]
}

/// A header for tensors of these shapes in bf16, one after the other.
fn header(shapes: &[(String, Vec<usize>)]) -> Vec<u8> {
    let mut end = 0;
    let tensors = shapes.iter().map(|(name, shape)| {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        (name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}))
    });
    serde_json::Value::Object(tensors.collect()).to_string().into_bytes()
}

/// A whole file: the header with its length, and as many of the `data` bytes as the last offset in the header says, where it
/// says so, so that most inputs come past the check of the file's length.
fn file(header: &[u8], data: &[u8]) -> Vec<u8> {
    let json: serde_json::Value = serde_json::from_slice(header).unwrap_or_default();
    let ends = json.as_object().into_iter().flatten().filter_map(|(_, info)| info["data_offsets"][1].as_u64());
    let data = &data[..(ends.max().unwrap_or(0) as usize).min(data.len())];
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}

/// `{`: the header of a file, whose length and data are put to it. Else the file as it is.
fn weights(folder: &Path, data: &[u8]) {
    let bytes = if data.starts_with(b"{") { file(data, &[0x3f; 4096]) } else { data.to_vec() };
    fs::write(folder.join("model.safetensors"), bytes).unwrap();
    read_all(folder, &["model.safetensors"]);
}

fn index(folder: &Path, data: &[u8]) {
    fs::write(folder.join("model.safetensors.index.json"), data).unwrap();
    // An index that misplaces a tensor is at fault in words about the shard.
    read_all(folder, &["index.json"]);
}

/// Every number of a model that loads is there to be read.
fn read_all(folder: &Path, files: &[&str]) {
    let model = match Model::load(folder.to_str().unwrap()) {
        Ok(model) => model,
        Err(error) => return files.iter().for_each(|file| names(&error, file)),
    };
    let read = |m: &Matrix| {
        let mut row = vec![0.0; m.cols()];
        (0..m.rows()).for_each(|i| m.row_f32(i, &mut row));
        row.iter().sum::<f32>()
    };
    let weights = &model.weights;
    let layer = &weights.layers[0];
    let linears = [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down, &weights.lm_head];
    let sum: f32 = linears.iter().map(|l| read(&l.weight)).chain([read(&weights.embed)]).sum();
    std::hint::black_box(sum);
    assert_eq!((layer.input_norm.len(), weights.final_norm.len()), (8, 8));
}

// tokenizer.json, and behind a zero byte, which no JSON has, a text to encode.

fn tokenizer(folder: &Path, data: &[u8]) {
    let (json, text) = halves(data);
    fs::write(folder.join("tokenizer.json"), json).unwrap();
    let tokenizer = match Tokenizer::load(folder) {
        Ok(tokenizer) => tokenizer.expect("there is a file"),
        Err(error) => return names(&error, "tokenizer.json"),
    };
    tokenizer.check_vocab(100).map_or_else(|e| names(&e, "tokenizer.json"), drop);
    let text = if text.is_empty() { "The cat\u{301} sat,  on 12\n🦀 <s>mats</s> Ünd".into() } else { text };
    let ids = match tokenizer.encode(&text, true) {
        Ok(ids) => ids,
        Err(error) => {
            names(&error, "tokenizer.json");
            vec![]
        }
    };
    // Ids of its own, and any.
    let ids: Vec<u32> = ids.into_iter().take(200).chain(0..20).chain([u32::MAX, 1 << 20]).collect();
    tokenizer.decode(&ids).map_or_else(|e| names(&e, "tokenizer.json"), drop);
    let mut stream = tokenizer.stream(&ids[..3]);
    for &id in &ids {
        if let Err(error) = stream.push(id) {
            return names(&error, "tokenizer.json");
        }
    }
    stream.flush().map_or_else(|e| names(&e, "tokenizer.json"), drop);
}

/// What lies before the first zero byte, and the text behind it.
fn halves(data: &[u8]) -> (&[u8], String) {
    match data.iter().position(|&b| b == 0) {
        Some(at) => (&data[..at], String::from_utf8_lossy(&data[at + 1..]).into_owned()),
        None => (data, String::new()),
    }
}

// A list of token ids, and the text that streams from them.

fn ids(_: &Path, data: &[u8]) {
    static RECALL: OnceLock<Tokenizer> = OnceLock::new();
    // The targets' package lies in a folder of the engine's.
    let folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|folder| folder.join("tests/fixtures/recall"));
    let recall = || Tokenizer::load(&folders.clone().find(|folder| folder.is_dir()).unwrap());
    let tokenizer = RECALL.get_or_init(|| recall().unwrap().unwrap());
    let ids = match ids_of_json(data) {
        Ok(ids) => ids,
        Err(what) => return assert!(!what.is_empty() && what.len() < 1000, "{what}"),
    };
    let n_ids = tokenizer.n_ids() as u32;
    let ids: Vec<u32> = ids.into_iter().take(300).map(|id| id % n_ids).collect();
    let whole = tokenizer.decode(&ids).unwrap();
    let mut stream = tokenizer.stream(&[]);
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    pieces.push(stream.flush().unwrap());
    if !whole.contains(char::REPLACEMENT_CHARACTER) {
        assert_eq!(pieces.concat(), whole, "{ids:?}");
        assert_eq!(tokenizer.decode(&tokenizer.encode(&whole, false).unwrap()).unwrap(), whole, "{ids:?}");
    }
}

// A chat template, and behind a zero byte what the user says.

fn chat_template(folder: &Path, data: &[u8]) {
    let (template, text) = halves(data);
    fs::write(folder.join("chat_template.jinja"), template).unwrap();
    fs::write(folder.join("tokenizer_config.json"), r#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#)
        .unwrap();
    let template = match ChatTemplate::load(folder) {
        Ok(template) => template.expect("there is a file"),
        Err(error) => return names(&error, "chat_template.jinja"),
    };
    let said = if text.is_empty() { "Hi, <you> & \"me\"" } else { &text };
    let messages = [("system", "Be brief."), ("user", said), ("assistant", " Hello. "), ("user", "\u{1b}[1mOn\n")];
    let messages = messages.map(|(role, content)| Message { role, content });
    for n in [4, 2] {
        match template.render(&messages[..n], n == 4) {
            Ok(text) => drop(text),
            // The template's own words.
            Err(Error::Usage(what)) => assert!(what.contains("refuses") && what.len() < 9000, "{what}"),
            Err(error) => names(&error, "chat_template.jinja"),
        }
    }
}

// Lines of a LongBench file, and behind a zero byte what a model said.

fn questions(folder: &Path, data: &[u8]) {
    let (lines, said) = halves(data);
    // Each metric, and both fields of prompts in either order.
    for name in ["qasper", "gov_report", "trec", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"] {
        let file = format!("{name}.jsonl");
        fs::write(folder.join(&file), lines).unwrap();
        let items = match longbench::items(folder, name) {
            Ok(items) => items,
            Err(error) => {
                blames(&error, 2, &file);
                continue;
            }
        };
        let task = longbench::task(name).unwrap();
        assert!(!items.is_empty());
        for item in &items {
            assert!(task.prompt(item).contains(&item.context));
            // It is shown while the item is measured.
            assert!(item.id.len() < 1000 && !item.id.contains(char::is_control), "{:?}", item.id);
            for said in [&said, &item.answers[0]] {
                // As long as 512 tokens may be.
                let said: String = said.chars().take(1024).collect();
                let score = task.score(&said, item);
                assert!((0.0..=1.0).contains(&score), "{name}: {score}");
            }
        }
    }
}

// What an input takes of the heap.

/// The system's allocator, which keeps this thread's count.
struct Counted;

thread_local! {
    static LIVE: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    LIVE.set(LIVE.get() + bytes);
    PEAK.set(PEAK.get().max(LIVE.get()));
}

#[allow(unsafe_code)] // A global allocator.
// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as i64 - layout.size() as i64);
        // SAFETY: the caller's promise is the same.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;
