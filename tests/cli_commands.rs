//! `plan`, `doctor` and `chat`, as users and scripts meet them: the built binary on the recall model.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};

use common::{command, fixture, kv};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use specache::device::DeviceOptions;
use specache::kv::{KvMode, KvOptions};
use specache::{Buffers, Engine, Prompt};

/// Runs a command with this on its stdin.
fn with_input(args: &[&str], input: impl AsRef<[u8]>) -> Output {
    let mut child = spawn(args);
    child.stdin.take().unwrap().write_all(input.as_ref()).unwrap();
    child.wait_with_output().unwrap()
}

fn spawn(args: &[&str]) -> Child {
    command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[track_caller]
fn assert_fails(args: &[&str], code: i32, words: &[&str]) {
    let output = with_input(args, "");
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(words.iter().all(|word| stderr.contains(word)), "{words:?}: {stderr}");
}

// plan

fn plan(args: &[&str]) -> (Value, String) {
    let output = command(&[&["plan", "-o", "json"], args].concat()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    (serde_json::from_slice(&output.stdout).unwrap(), text(&output.stderr).to_string())
}

fn number(of: &Value, name: &str) -> u64 {
    of[name].as_u64().unwrap_or_else(|| panic!("no {name} in {of}"))
}

/// Every number of bytes is what the engine then holds; a budget of exactly that is enough, of one byte less is not.
#[test]
fn plan_says_what_the_engine_allocates() {
    const CONTEXT: usize = 700;
    let recall = fixture("recall");
    for model in ["synthetic:tiny", recall.to_str().unwrap()] {
        let (planned, _) = plan(&["-m", model, "-c", "700", "--kv-bits", "1", "--kv-top-k", "48"]);
        assert_eq!(planned["modes"].as_array().unwrap().len(), 5);
        for mode in planned["modes"].as_array().unwrap() {
            let name = mode["kv"].as_str().unwrap();
            let kv = kv(KvMode::ALL.into_iter().find(|m| m.name() == name).unwrap(), 1, 64, 64, 48);
            let needed = number(mode, "kv_device_bytes") + number(mode, "workspace_bytes");
            let engine = |budget: u64| {
                let options = DeviceOptions { device_budget: Some(budget), threads: Some(1), ..common::options(1) };
                Engine::load(model, &options).unwrap()
            };
            let prefill = |engine: &Engine| {
                let mut session = engine.session(kv, CONTEXT)?;
                let tokens: Vec<u32> = (0..CONTEXT as u32).map(|i| 3 + i % 400).collect();
                let prompt = Prompt { session: &mut session, tokens: &tokens };
                engine.prefill(&mut [prompt], &mut Buffers::default())?.remove(0)?;
                Ok::<_, specache::Error>(session)
            };
            let enough = engine(needed);
            let session = enough.session(kv, CONTEXT).unwrap();
            let held = session.cache_bytes();
            let of = ["packed_bytes", "residual_bytes", "slot_bytes", "load_bytes", "kv_host_bytes"];
            let planned_bytes = of.map(|name| number(mode, name));
            assert_eq!(planned_bytes, [held.packed, held.wide, held.slots, held.loads, held.host], "{model} {name}");
            assert_eq!(enough.device().device_memory().used(), number(mode, "kv_device_bytes"), "{model} {name}");
            drop(session);
            prefill(&enough).unwrap();
            assert_eq!(enough.device().device_memory().peak(), needed, "{model} {name}");
            let short = prefill(&engine(needed - 1)).err().expect("a byte is missing");
            assert_eq!(short.exit_code(), 4, "{short}");
        }
    }
}

/// The answers are the borders: what is named fits, and one more does not.
#[test]
fn plan_finds_the_largest() {
    let room = ["-m", "synthetic:llama-3-8b", "--gpu", "4090", "--vram", "26GiB", "--host", "16GiB"];
    let (planned, notes) = plan(&[&room[..], &["-c", "32768", "-b", "2"]].concat());
    assert!(!notes.contains("do not fit") && notes.contains("max_position_embeddings is 8192"), "{notes}");
    for (i, mode) in planned["modes"].as_array().unwrap().iter().enumerate() {
        let fits = |context: u64, batch: u64| {
            let (c, b) = (context.to_string(), batch.to_string());
            plan(&[&room[..], &["-c", &c, "-b", &b]].concat()).0["modes"][i]["fits"].as_bool().unwrap()
        };
        let (context, batch) = (number(mode, "largest_context"), number(mode, "largest_batch"));
        assert!(context >= 32768 && fits(context, 2) && !fits(context + 1, 2), "{mode}");
        assert!(batch >= 2 && fits(32768, batch) && !fits(32768, batch + 1), "{mode}");
        assert!(mode["step_ms"].as_f64().unwrap() > 15.0, "16 GB at 1 TB/s: {mode}");
    }
    let of = |i: usize, name: &str| planned["modes"][i][name].as_f64().unwrap();
    assert!(of(4, "tokens_per_s") > of(2, "tokens_per_s") && of(4, "tokens_per_s") >= of(3, "tokens_per_s"));
    assert_eq!(number(&planned, "weight_bytes"), 2 * 8_030_261_248 - 2 * 266_240, "matrices, without the norms");
}

#[test]
fn plan_says_what_does_not_fit() {
    let big = ["-m", "synthetic:llama-3-8b", "-c", "131072", "-b", "4"];
    let (planned, notes) = plan(&[&big[..], &["--vram", "24GiB", "--host", "32GiB"]].concat());
    assert_eq!(planned["modes"][0]["fits"], false);
    for words in ["--kv full: 4 x 131072 tokens do not fit: device", "of 24.0 GiB (--vram)", "-b 4 fits up to -c"] {
        assert!(notes.contains(words), "{words}: {notes}");
    }
    assert!(notes.contains("--kv specache") && notes.contains("host 64.0 GiB of 32.0 GiB (--host)"), "{notes}");
    let (_, notes) = plan(&[&big[..], &["--vram", "1GiB"]].concat());
    assert!(notes.contains("the weights alone are more"), "{notes}");
    assert_fails(&["plan", "-m", "synthetic:tiny", "-b", "0"], 2, &["-b 0"]);
    assert_fails(&["plan", "-m", "synthetic:tiny", "-c", "999999999"], 2, &["at most 268435456"]);
    assert_fails(&["plan", "-m", "/nowhere"], 3, &["/nowhere"]);
}

/// More sequences than the engine supports are refused, and never said to fit.
#[test]
fn plan_has_the_engines_largest_batch() {
    let room = ["-m", "synthetic:tiny", "-c", "1", "--vram", "1000TiB", "--host", "1000TiB"];
    let (planned, notes) = plan(&[&room[..], &["-b", "1048576"]].concat());
    assert!(notes.is_empty(), "{notes}");
    for mode in planned["modes"].as_array().unwrap() {
        assert_eq!((&mode["fits"], number(mode, "largest_batch")), (&Value::Bool(true), 1 << 20), "{mode}");
    }
    for batch in ["1048577", "99999999999999"] {
        let words = format!("-b {batch}: at most 1048576 sequences are supported");
        assert_fails(&[&["plan"], &room[..], &["-b", batch]].concat(), 2, &[&words]);
    }
}

/// Without a GPU caches and host pages lie in the same RAM, which is counted once.
#[test]
fn plan_counts_shared_memory_once() {
    let (planned, notes) = plan(&["-m", "synthetic:tiny", "-c", "20000000"]);
    assert_eq!(planned["shared"], true, "{notes}");
    let room = number(&planned, "vram_bytes");
    for mode in planned["modes"].as_array().unwrap() {
        let taken = number(mode, "device_bytes") + number(mode, "host_bytes");
        assert_eq!(mode["fits"], taken <= room, "{mode}");
    }
    let (apart, _) = plan(&["-m", "synthetic:tiny", "-c", "1000", "--vram", "1GiB", "--host", "1GiB"]);
    assert_eq!(apart["shared"], false);
    assert_fails(&["plan", "-m", "synthetic:tiny", "-c", "0"], 2, &["-c 0"]);
}

#[test]
fn plan_is_a_table_for_people() {
    let output = command(&["plan", "-m", "synthetic:llama-3-8b", "--gpu", "h200", "--host", "1TiB"]).output().unwrap();
    let table = text(&output.stdout);
    for words in [
        "| weights",
        "specache |",
        "largest batch of 8192 tokens",
        "largest context, batch of 1",
        "tokens/s",
        "estimated, not measured",
    ] {
        assert!(table.contains(words), "{words}: {table}");
    }
}

// doctor

#[test]
fn doctor_says_how_it_is() {
    let output = command(&["doctor"]).output().unwrap();
    let report = text(&output.stdout);
    assert!(output.status.success(), "{report}");
    for line in report.lines() {
        let known = ["ok       ", "note     ", "problem  ", "         -> "];
        assert!(known.iter().any(|begin| line.starts_with(begin)), "{line:?}");
    }
    for words in
        ["instruction set", "NUMA", "CPU quota", "no NVIDIA driver", "GPU kernels", "cuBLASLt", "memory", "huge pages"]
    {
        assert!(report.contains(words), "{words}: {report}");
    }
    let output = command(&["doctor"]).env("SPECACHE_ISA", "mmx").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stdout).contains("problem  instruction set"), "{output:?}");
}

// chat

const FACT: &str = "The password of kose is zesi rere bago. Recall kose";
const PLAIN: &str = "{% for m in messages %}{{ m.content }}{% endfor %}";
/// Forgets what was answered.
const FORGETFUL: &str = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}";

/// The recall model with a chat template, in a folder of its own.
fn chat_model(name: &str, template: &str) -> String {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("chat-{name}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    for file in
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    {
        fs::copy(fixture("recall").join(file), folder.join(file)).unwrap();
    }
    fs::write(folder.join("chat_template.jinja"), template).unwrap();
    folder.to_str().unwrap().to_string()
}

/// Answers and notes of a conversation.
fn chat(model: &str, options: &[&str], input: &str) -> (String, String) {
    chat_ends(0, model, options, input)
}

/// Those of one that ends with this exit code.
#[track_caller]
fn chat_ends(code: i32, model: &str, options: &[&str], input: impl AsRef<[u8]>) -> (String, String) {
    let output = with_input(&[&["chat", "--device", "cpu", "-m", model], options].concat(), input);
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    (text(&output.stdout).to_string(), text(&output.stderr).to_string())
}

/// What `generate` makes of a text, and how many tokens the text has.
fn generated(kv: &str, prompt: &str) -> (String, u64) {
    let recall = fixture("recall");
    let args = ["generate", "-m", recall.to_str().unwrap(), "-n", "4", "--json", "--kv", kv, "-p", prompt];
    let json: Value = serde_json::from_slice(&command(&args).output().unwrap().stdout).unwrap();
    (json["text"].as_str().unwrap().to_string(), number(&json, "prompt_tokens"))
}

/// Each turn continues the cache: it answers as if it had read the whole text, and only what is new is prefilled.
#[test]
fn turns_continue_one_cache() {
    let model = chat_model("turns", PLAIN);
    for kv in ["full", "kivi", "specache"] {
        let (answers, notes) = chat(&model, &["-n", "4", "--kv", kv], &format!("{FACT}\n Recall kose\n/stats\n"));
        assert_eq!(answers, " zesi rere bago.\n zesi rere bago.\n", "{kv}: {notes}");
        let (answer, whole) = generated(kv, &format!("{FACT} zesi rere bago. Recall kose"));
        assert_eq!(answer, " zesi rere bago.");
        // Three tokens of the first answer came by decoding, its last one by the second turn's prefill.
        assert!(notes.contains(&format!("prefill: {} tokens", whole - 3)), "{kv}, {whole}: {notes}");
        assert!(notes.contains("decode: 6 tokens") && notes.contains("residual"), "{kv}: {notes}");
        assert!(notes.contains(&format!("context: {} of 4096", whole + 3)), "{kv}: {notes}");
        assert!(!notes.contains('>'), "prompts are for terminals: {notes}");
    }
}

/// Beyond the residual: the second turn continues, or cuts, a cache whose pages are offloaded, and grows it.
#[test]
fn long_conversations_in_every_mode() {
    let long = "In the morning there was a letter. ".repeat(40) + FACT;
    for (name, template) in [("long", PLAIN), ("long-forgetful", FORGETFUL)] {
        let model = chat_model(name, template);
        for kv in KvMode::ALL.map(KvMode::name) {
            let input = format!("{long}\n Recall kose\n Recall kose\n/stats\n");
            let (answers, notes) = chat(&model, &["-n", "4", "--kv", kv], &input);
            assert_eq!(answers, " zesi rere bago.\n".repeat(3), "{name} {kv}: {notes}");
            let on_host = !notes.contains("host KV 0 B");
            assert_eq!(on_host, ["offload", "fetch", "specache"].contains(&kv), "{kv}: {notes}");
        }
    }
}

/// A template that rewrites what was said: what is still true of the cache stays; the answer is that of the new text.
#[test]
fn a_template_may_rewrite_earlier_turns() {
    let model = chat_model("forgetful", FORGETFUL);
    let (answer, whole) = generated("full", &format!("{FACT} Recall kose"));
    let first = generated("full", FACT).1;
    for (kv, prefilled) in [("full", whole), ("specache", whole), ("kivi", first + whole)] {
        let (answers, notes) = chat(&model, &["-n", "4", "--kv", kv], &format!("{FACT}\n Recall kose\n/stats\n"));
        assert_eq!(answers, format!(" zesi rere bago.\n{answer}\n"), "{kv}: {notes}");
        assert!(notes.contains(&format!("prefill: {prefilled} tokens")), "{kv}, {first} + {whole}: {notes}");
    }
}

#[test]
fn commands_of_a_chat() {
    let model = chat_model("commands", PLAIN);
    let input = format!("/help\n{FACT}\n/reset\n/system {FACT}\n\n Recall kose\n/nonsense\n/quit\n{FACT}\n");
    let (answers, notes) = chat_ends(2, &model, &["-n", "4"], &input);
    assert_eq!(answers.lines().count(), 2, "nothing behind /quit: {answers}");
    assert_eq!(answers.lines().next(), Some(" zesi rere bago."));
    for words in ["/system TEXT", "begins anew", "/nonsense is no command"] {
        assert!(notes.contains(words), "{words}: {notes}");
    }
    let system = chat(&model, &["-n", "4", "--system", FACT], " Recall kose").0;
    assert_eq!(answers.lines().nth(1), system.lines().next(), "the end of the input ends it as well");
}

#[test]
fn a_full_context_is_told_and_can_be_reset() {
    let model = chat_model("full", PLAIN);
    let (answers, notes) = chat_ends(2, &model, &["-n", "40", "-c", "15"], format!("{FACT}\n{FACT}\n/reset\n{FACT}\n"));
    assert_eq!(answers.lines().count(), 2, "{answers} {notes}");
    assert!(notes.contains("the context of 15 tokens is full: the answer ends here; /reset"), "{notes}");
    assert!(notes.contains("this conversation has"), "{notes}");
}

/// A script looks at the exit code: that of the first failure, whatever comes behind it. A person has seen it.
#[test]
fn a_failed_line_of_a_pipe_is_in_the_exit_code() {
    let model = chat_model("failed", PLAIN);
    let options = ["-n", "4", "-c", "40"];
    let too_long = "In the morning there was a letter. ".repeat(20);
    for (bad, words) in [
        (too_long.as_bytes(), "the context of 40 tokens is full"),
        (b"caf\xe9", "byte 3 of this line is not valid UTF-8"),
        (b"/statistics", "/statistics is no command"),
    ] {
        let input = [bad, b"\n", FACT.as_bytes(), b"\n/quit\n"].concat();
        let (answers, notes) = chat_ends(2, &model, &options, &input);
        assert_eq!(answers, " zesi rere bago.\n", "the conversation goes on");
        let last = notes.lines().last().unwrap();
        assert!(last.starts_with("error: ") && last.contains(words), "{words}: {notes}");
        assert!(notes.contains("one line of the input failed"), "{notes}");
    }
    let (_, notes) = chat_ends(2, &model, &options, "/a\n/b\n");
    assert!(notes.contains("2 lines") && notes.ends_with("error: /a is no command; /help lists them\n"), "{notes}");
    // No room for a cache is another code.
    let (answers, _) = chat_ends(4, &model, &["--vram-budget", "1KiB"], format!("{FACT}\n/nonsense\n"));
    assert_eq!(answers, "");

    let (mut ours, its) = common::terminal();
    let mut at_terminal = command(&["chat", "--device", "cpu", "-m", &model]);
    let mut child = at_terminal.stdin(its).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    ours.write_all(b"/nonsense\n/quit\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn models_without_a_template() {
    let recall = fixture("recall");
    let recall = recall.to_str().unwrap();
    assert_fails(&["chat", "-m", recall], 2, &["no chat template", "`generate`", "--raw -n 100"]);
    assert_fails(&["chat", "-m", "synthetic:tiny", "--raw"], 2, &["no tokenizer.json", "`generate`"]);
    assert_fails(&["chat", "-m", recall, "--raw", "-n", "0"], 2, &["-n 0"]);
    let (answers, _) = chat(recall, &["--raw", "-n", "4"], &format!("{FACT}\nRecall kose\n"));
    assert!(answers.starts_with(" zesi rere bago.\n") && answers.lines().count() == 2, "{answers}");
}

/// Ctrl-C ends the answer, which stays a part of the conversation; at the prompt it ends the program.
#[test]
fn ctrl_c_stops_the_answer_then_the_program() {
    let model = chat_model("ctrl-c", PLAIN);
    // An answer that nothing else ends.
    fs::write(PathBuf::from(&model).join("generation_config.json"), r#"{"eos_token_id": 1535}"#).unwrap();
    let mut child = spawn(&["chat", "-m", &model, "-c", "100000", "--temp", "1"]);
    let interrupt = |child: &Child| kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    let mut stdin = child.stdin.take().unwrap();
    writeln!(stdin, "{FACT}").unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    interrupt(&child);
    let mut notes = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(notes.any(|line| line == "(stopped)"));
    writeln!(stdin, "/stats").unwrap();
    assert!(notes.any(|line| line.starts_with("hit rate")), "the program goes on");
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));

    // Whoever asks the program to end does not mean the answer alone.
    let mut child = spawn(&["chat", "-m", &model, "-c", "100000", "--temp", "1"]);
    let mut stdin = child.stdin.take().unwrap();
    writeln!(stdin, "{FACT}").unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

/// The defaults of the engine and of the command are the same.
#[test]
fn plan_has_the_engines_defaults() {
    let (planned, _) = plan(&["-m", "synthetic:tiny", "-c", "1000"]);
    let engine = common::engine("synthetic:tiny");
    let bytes = engine.plan(&KvOptions::default(), 1000).unwrap();
    assert_eq!(number(&planned["modes"][4], "kv_device_bytes"), bytes.device());
}

/// What would be missed is told: options and files without effect, sizes in bytes, what binds a batch.
#[test]
fn what_has_no_effect_is_told() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("commands-told");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    for entry in fs::read_dir(fixture("recall")).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    let model = folder.to_str().unwrap();
    let said = |args: &[&str]| {
        let output = with_input(&[&["generate", "-m", model, "-p", "Recall kose", "-n", "1"], args].concat(), "");
        assert!(output.status.success(), "{output:?}");
        text(&output.stderr).to_string()
    };
    assert!(!said(&[]).contains("warning"));
    assert!(said(&["--top-p", "0.5"]).contains("warning: --top-p has no effect"));
    assert!(!said(&["--top-p", "0.5", "--temp", "0.7"]).contains("warning"));
    fs::write(folder.join("tokenizer_config.json"), "{").unwrap();
    let damaged = said(&[]);
    assert!(damaged.contains("warning: ") && damaged.contains("tokenizer_config.json: not valid JSON"), "{damaged}");

    let weights = folder.join("model.safetensors");
    fs::remove_file(&weights).unwrap();
    std::os::unix::fs::symlink("../blobs/gone", &weights).unwrap();
    let generate = ["generate", "-m", model, "-p", "x", "-n", "1"];
    assert_fails(&generate, 3, &["model.safetensors", "is a link to ../blobs/gone, which is not there"]);
    assert_fails(&["generate", "-m", "", "-p", "x", "-n", "1"], 2, &["the model's name is empty"]);
    let empty = folder.join("empty.txt");
    fs::write(&empty, "").unwrap();
    let recall = fixture("recall");
    let empty = ["-m", recall.to_str().unwrap(), "-f", empty.to_str().unwrap()];
    assert_fails(&[&["generate", "-n", "1"], &empty[..]].concat(), 2, &["empty.txt: the file is empty"]);
    assert_fails(&[&["eval", "ppl"], &empty[..]].concat(), 2, &["empty.txt: the file is empty"]);

    let planned =
        |args: &[&str]| with_input(&[&["plan", "-m", "synthetic:llama-3-8b", "--gpu", "h200"], args].concat(), "");
    let few = planned(&["--vram", "24"]);
    assert!(text(&few.stderr).contains("--vram 24 is 24 bytes; did you mean 24GiB?"), "{few:?}");
    let bound = planned(&["-c", "8k", "--host", "4GiB"]);
    let table = text(&bound.stdout);
    assert!(table.contains("1 x 8192 tokens"), "{table}");
    assert!(
        table.contains("of offload, fetch, specache is bound by host memory, 4.0 GiB (--host): see --host"),
        "{table}"
    );
    let enough = planned(&["-c", "8k", "--host", "4TiB"]);
    assert!(!text(&enough.stdout).contains("bound by host"), "{enough:?}");
}
