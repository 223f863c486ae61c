//! The system fails: each read, look-up and mapping of a model's files, each large mapping and buffer of memory, each write
//! of an output file, one after the other and until none is left to fail. Every failure is said in words that name the thing,
//! nothing panics, no file is left half written, and the next request, or the same load again, is right.
//!
//! tests/common/faulty.c does it to the very calls that the C library is asked for. What small vectors and maps take is not
//! among it: Rust ends the process where that is refused.
#![allow(unsafe_code)] // Two functions of that library.

mod common;

use std::ffi::{CString, c_char, c_int, c_long};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use common::{fixture, kv, options};
use specache::chat::{ChatTemplate, Message};
use specache::kv::{KvMode, KvOptions};
use specache::tokenizer::Tokenizer;
use specache::{Buffers, Engine, Next, Prompt, Result};

/// Set where a test runs again with the library before the C library: the model's folder.
const FOLDER: &str = "FAULTY_FOLDER";

fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("faulty-{}.so", std::process::id()));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common/faulty.c");
        let gcc = Command::new("gcc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).status();
        assert!(gcc.unwrap().success());
        library
    })
}

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("system-{name}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// A small model with every file that a folder may have.
fn model(name: &str, of: &str) -> PathBuf {
    let folder = folder(name);
    for entry in fs::read_dir(fixture("hf").join(of)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    let mut tokenizer: serde_json::Value = common::json(fixture("fuzz/tokenizer/byte_level.json"));
    // A text for each id of the model.
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    (vocab.len()..64).for_each(|id| drop(vocab.insert(format!("w{id}"), id.into())));
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::copy(fixture("fuzz/chat_template/chatml.jinja"), folder.join("chat_template.jinja")).unwrap();
    fs::write(folder.join("tokenizer_config.json"), r#"{"bos_token": "<s>"}"#).unwrap();
    fs::write(folder.join("generation_config.json"), r#"{"do_sample": false}"#).unwrap();
    folder
}

/// Runs a test of this file again, in a process whose calls can be made to fail.
fn again(test: &str, folder: &Path) {
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child.args([test, "--exact", "--nocapture"]).env("LD_PRELOAD", library()).env(FOLDER, folder).output();
    let output = output.unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{out}{err}");
    print!("{out}");
}

/// The library's functions, in such a process.
struct Faulty {
    arm: unsafe extern "C" fn(*const c_char, c_long),
    struck: unsafe extern "C" fn() -> c_int,
}

impl Faulty {
    fn find() -> Faulty {
        let this = libloading::os::unix::Library::this();
        // SAFETY: the functions of tests/common/faulty.c.
        unsafe { Faulty { arm: *this.get(b"faulty_arm").unwrap(), struck: *this.get(b"faulty_struck").unwrap() } }
    }

    fn arm(&self, kind: &str, index: i32) {
        let kind = CString::new(kind).unwrap();
        // SAFETY: a C string, which is copied.
        unsafe { (self.arm)(kind.as_ptr(), index.into()) }
    }

    fn struck(&self) -> bool {
        // SAFETY: reads a number.
        unsafe { (self.struck)() != 0 }
    }
}

const KV: fn() -> KvOptions = || kv(KvMode::SpeCache, 1, 32, 33, 7);

/// All that is loaded for a conversation: weights, tokenizer, chat template.
fn load(folder: &Path) -> Result<(Engine, Vec<u32>)> {
    let engine = Engine::load(folder.to_str().unwrap(), &options(1))?;
    let tokenizer = Tokenizer::load(folder)?.expect("a tokenizer");
    let template = ChatTemplate::load(folder)?.expect("a template");
    let said = [Message { role: "user", content: "the cat sat on the mats" }];
    Ok((engine, tokenizer.encode(&template.render(&said, true)?, true)?))
}

/// A prompt of more than two pages and 40 steps.
fn request(engine: &Engine, text: &[u32], kv: KvOptions) -> Result<Vec<Vec<f32>>> {
    let prompt: Vec<u32> = text.iter().copied().cycle().take(150).collect();
    let (mut session, mut buffers) = (engine.session(kv, 200)?, Buffers::default());
    let mut rows = engine
        .prefill(&mut [Prompt { session: &mut session, tokens: &prompt }], &mut buffers)?
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    for token in 0..40 {
        engine.decode(&mut [Next { session: &mut session, token }], &mut buffers)?;
        rows.push(buffers.logits(0)?.to_vec());
    }
    Ok(rows)
}

/// Fails each call of a kind in turn, from the load to the last step. Returns how many there are, and how many of them mattered.
fn sweep(faulty: &Faulty, kind: &str, folder: &Path, kv: KvOptions, codes: &[u8]) -> (i32, i32) {
    faulty.arm("none", 0);
    let sound = {
        let (engine, text) = load(folder).unwrap();
        request(&engine, &text, kv).unwrap()
    };
    let mut failures = 0;
    for index in 0.. {
        let (what, before) = (format!("{kind} {index}"), failures);
        let mut check = |error: specache::Error| {
            let text = error.to_string();
            assert!(faulty.struck() && codes.contains(&error.exit_code()), "{what}: {text}");
            let named = if error.exit_code() == 4 { " bytes" } else { folder.to_str().unwrap() };
            assert!(text.contains(named), "{what}: {text}");
            faulty.arm("none", 0);
            failures += 1;
        };
        faulty.arm(kind, index);
        let (engine, text) = load(folder).unwrap_or_else(|error| {
            check(error);
            load(folder).unwrap()
        });
        let rows = request(&engine, &text, kv).unwrap_or_else(|error| {
            check(error);
            assert_eq!((engine.host_pages().leased, engine.host_pages().reserved), (0, 0), "{what}");
            assert_eq!(engine.device().device_memory().used(), 0, "{what}");
            request(&engine, &text, kv).unwrap()
        });
        assert!(rows == sound, "{what}: other bits");
        if !faulty.struck() && failures == before {
            return (index, failures);
        }
    }
    unreachable!()
}

#[test]
fn each_call_of_a_load_and_a_request_may_fail() {
    if std::env::var_os(FOLDER).is_none() {
        return again("each_call_of_a_load_and_a_request_may_fail", &model("load", "qwen3"));
    }
    let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let faulty = Faulty::find();
    // config, generation_config, weights, tokenizer, tokenizer_config, template: each is looked at, opened, and read twice but
    // for the weights, which are mapped.
    for (kind, codes, at_least) in [("open", &[1][..], 6), ("stat", &[1, 3], 6), ("read", &[1], 10)] {
        let (calls, failures) = sweep(&faulty, kind, &folder, KV(), codes);
        println!("{kind}: {calls} calls, {failures} failures");
        assert!(calls >= at_least && failures == calls, "{kind}: {calls} calls, {failures} failures");
    }
    // The weights, and host pages: where reserved huge pages, or as many pages as it likes to map at once, are refused, the
    // slab asks for others. Nothing is left to ask for when all are refused.
    for (kind, at_least) in [("map", 1), ("map+", 2)] {
        let (maps, failures) = sweep(&faulty, kind, &folder, KV(), &[1, 4]);
        println!("{kind}: {maps} calls, {failures} failures");
        assert!(maps >= 3 && failures >= at_least, "{kind}: {maps} mappings, {failures} failures");
    }
    let (buffers, failures) = sweep(&faulty, "memory", &folder, KV(), &[4]);
    println!("memory: {buffers} calls, {failures} failures");
    assert!(buffers >= 10 && failures == buffers, "{buffers} buffers, {failures} failures");
}

#[test]
fn each_read_of_a_sharded_model_may_fail() {
    if std::env::var_os(FOLDER).is_none() {
        return again("each_read_of_a_sharded_model_may_fail", &model("shards", "sharded"));
    }
    let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let faulty = Faulty::find();
    let kv = KvOptions { mode: KvMode::Offload, ..KV() };
    for (kind, codes) in [("open", &[1][..]), ("stat", &[1, 3]), ("read", &[1]), ("map", &[1, 4])] {
        let (calls, failures) = sweep(&faulty, kind, &folder, kv, codes);
        println!("{kind}: {calls} calls, {failures} failures");
        let sure = if kind == "map" { 2 } else { calls }; // the two shards
        assert!(calls >= 4 && failures >= sure, "{kind}: {calls} calls, {failures} failures");
    }
}

// The command line.

/// The command with a fault in the files of `folder`; whether it struck, and how it ended.
fn faulty(folder: &Path, fault: &str, args: &[&str]) -> (bool, Output) {
    let report = folder.with_extension("struck");
    let _ = fs::remove_file(&report);
    let mut command = common::command(args);
    command.env("LD_PRELOAD", library());
    let output = command.env(FOLDER, folder).env("FAULTY", fault).env("FAULTY_REPORT", &report).output().unwrap();
    (report.exists(), output)
}

/// Each call of a kind fails: the exit code is one of these, and stderr ends with an error that names a file or bytes.
fn sweep_command(kind: &str, folder: &Path, args: &[&str], codes: &[i32], after: impl Fn(&Output)) -> usize {
    for index in 0.. {
        let (struck, output) = faulty(folder, &format!("{kind}:{index}"), args);
        let (code, text) = (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr));
        let what = format!("{kind} {index}, {code}: {text}");
        assert!(code == 0 || struck && codes.contains(&code), "{what}");
        if code != 0 {
            let words = text.lines().last().unwrap_or_default();
            assert!(words.starts_with("error: ") && !words.contains("internal error"), "{what}");
            assert!(words.contains(folder.to_str().unwrap()) || words.contains(" bytes"), "{what}");
        }
        after(&output);
        if !struck {
            return index;
        }
    }
    unreachable!()
}

#[test]
fn the_command_says_what_could_not_be_read() {
    let folder = model("command", "qwen3");
    let dir = folder.to_str().unwrap();
    let args = ["generate", "-m", dir, "-p", "the cat", "-n", "3", "--kv-group", "32", "--temp", "0"];
    let sound = faulty(&folder, "none:0", &args).1;
    assert!(sound.status.success() && !sound.stdout.is_empty(), "{sound:?}");
    for (kind, codes, at_least) in [("open", &[1][..], 4), ("stat", &[1, 3], 4), ("read", &[1], 6), ("map", &[1, 4], 1)]
    {
        let calls = sweep_command(kind, &folder, &args, codes, |output| {
            assert!(output.stdout == if output.status.success() { &sound.stdout[..] } else { b"" }, "{output:?}");
        });
        assert!(calls >= at_least, "{kind}: {calls}");
    }
}

/// A full disk, and a rename that fails: an error with the file's name, and neither it nor a part of it.
#[test]
fn output_files_are_whole_or_not_there() {
    let outputs = folder("outputs");
    let ids = folder("ids").join("ids.json");
    fs::write(&ids, format!("{:?}", (0..90).collect::<Vec<_>>())).unwrap();
    let [ids, npy, selections, trace] = [ids, outputs.join("o.npy"), outputs.join("s.json"), outputs.join("t.json")];
    let [ids, npy, selections, trace] = [&ids, &npy, &selections, &trace].map(|path| path.to_str().unwrap());
    let logits = ["logits", "-m", "synthetic:tiny", "--tokens", ids, "--prefill", "70", "-o", npy, "--trace", trace];
    let logits = [&logits[..], &["--trace-selections", selections]].concat();
    let generate = ["generate", "-m", "synthetic:tiny", "--tokens", ids, "-n", "3", "--json", "--trace", trace];
    let plot = outputs.join("p.svg");
    let bench = ["bench", "--overlap", "-m", "synthetic:tiny", "-d", "200", "-n", "1", "-r", "1", "--trace", trace];
    let bench = [&bench[..], &["--plot", plot.to_str().unwrap()]].concat();
    // Of a file of results the lines are whole: a later run continues it.
    let (model, results) = (fixture("recall"), outputs.join("r.jsonl"));
    let [model, results, plot] = [&model, &results, &plot].map(|path| path.to_str().unwrap());
    let eval = ["eval", "kld", "-m", model, "--tokens", ids, "-c", "40", "--kv", "kivi", "--device", "cpu"];
    let eval = [&eval[..], &["--output", results, "--plot", plot]].concat();
    for (args, whole, renamed) in [(&logits[..], 3, 3), (&generate[..], 1, 1), (&bench[..], 2, 2), (&eval[..], 2, 1)] {
        for kind in ["open", "write", "rename"] {
            let calls = sweep_command(kind, &outputs, args, &[1], |output| {
                let left: Vec<PathBuf> = fs::read_dir(&outputs).unwrap().map(|entry| entry.unwrap().path()).collect();
                if output.status.success() {
                    assert_eq!(left.len(), whole, "{left:?}");
                }
                for file in left {
                    let bytes = fs::read(&file).unwrap();
                    let whole = match file.extension().and_then(|e| e.to_str()).unwrap() {
                        "json" => serde_json::from_slice::<serde_json::Value>(&bytes).is_ok(),
                        "svg" => bytes.ends_with(b"</svg>\n"),
                        "jsonl" => bytes.split_inclusive(|&byte| byte == b'\n').all(|line| {
                            line.ends_with(b"\n") && serde_json::from_slice::<serde_json::Value>(line).is_ok()
                        }),
                        _ => bytes.len() == 128 + 20 * 512 * 4,
                    };
                    assert!(whole && !file.to_str().unwrap().contains(".tmp"), "{kind}: {}", file.display());
                    fs::remove_file(file).unwrap();
                }
            });
            let at_least = if kind == "rename" { renamed } else { whole };
            assert!(calls >= at_least, "{kind}: {calls}");
        }
    }
}

/// A file system without locks: results are kept all the same, with one warning that names the file.
#[test]
fn results_that_cannot_be_locked_are_kept_with_a_warning() {
    let outputs = folder("locks");
    let ids = folder("locks-ids").join("ids.json");
    fs::write(&ids, format!("{:?}", (0..90).collect::<Vec<_>>())).unwrap();
    let (model, results) = (fixture("recall"), outputs.join("r.jsonl"));
    let [ids, model, results] = [&ids, &model, &results].map(|path| path.to_str().unwrap());
    let args = ["eval", "ppl", "-m", model, "--tokens", ids, "-c", "40", "--kv", "full", "--output", results];
    let (struck, output) = faulty(&outputs, "lock:0", &args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(struck && output.status.success(), "{said}");
    let warnings: Vec<&str> = said.lines().filter(|line| line.contains("cannot be locked")).collect();
    assert!(
        warnings.len() == 1 && warnings[0].starts_with("warning: --output ") && warnings[0].contains(results),
        "{said}"
    );
    assert_eq!(fs::read_to_string(results).unwrap().lines().count(), 3);
}
