//! The command line, as users and scripts meet it: the built binary on the recall model.

mod common;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Distance, command, fixture, json, npy};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const PROMPT: &str = "The password of kose is zesi rere bago. Recall kose";

fn run(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

/// Stdout of a command that succeeds.
fn stdout(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// `generate` on the recall model.
fn generate(options: &[&str]) -> String {
    stdout(&[&["generate", "-m", &recall()], options].concat())
}

fn generate_json(options: &[&str]) -> Value {
    serde_json::from_str(&generate(&[options, &["--json"]].concat())).unwrap()
}

fn recall() -> String {
    path(fixture("recall"))
}

fn path(path: impl AsRef<Path>) -> String {
    path.as_ref().to_str().unwrap().to_string()
}

/// An empty folder for one test.
fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cli-{test}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A file of its own for each text.
fn file(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) -> String {
    let file = folder.join(name);
    fs::write(&file, bytes).unwrap();
    path(file)
}

fn assert_fails(args: &[&str], code: i32, words: &[&str]) {
    let output = run(args);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
    assert!(text.contains("error: ") && !text.contains("internal error"), "{args:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{args:?}: no {word:?} in {text}");
    }
}

// What it generates.

#[test]
fn text_is_all_that_goes_to_stdout() {
    let output = command(&["generate", "-m", &recall(), "-p", PROMPT, "-n", "4"]).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), " zesi rere bago.");
    let figures = String::from_utf8(output.stderr).unwrap();
    for word in ["prompt: 12 tokens", "tok/s", "generated: 4 tokens", "KV cache: specache", "hit rate", "acceptance"] {
        assert!(figures.contains(word), "no {word:?} in {figures}");
    }
    assert!(!figures.contains('\x1b'), "progress is for terminals: {figures:?}");
}

#[test]
fn a_file_is_the_same_prompt() {
    let folder = folder("file");
    let prompt = file(&folder, "prompt.txt", PROMPT);
    assert_eq!(generate(&["-f", &prompt, "-n", "12"]), generate(&["-p", PROMPT, "-n", "12"]));
}

#[test]
fn json_has_every_figure() {
    let text = "In the morning there was a letter. ".repeat(12) + PROMPT;
    let out = generate_json(&["-p", &text, "-n", "40", "--ignore-eos"]);
    assert_eq!(out["tokens"].as_array().unwrap().len(), 40);
    assert!(out["prompt_tokens"].as_u64().unwrap() > 128, "something is offloaded: {out}");
    assert!(out["text"].as_str().unwrap().len() > 40);
    assert_eq!(out["stop_reason"], "length");
    for figure in ["time_to_first_token_ms", "prefill_ms", "decode_ms", "prefill_tok_s", "decode_tok_s"] {
        assert!(out["timings"][figure].as_f64().unwrap() > 0.0, "{figure}: {out}");
    }
    assert!(out["cache"]["device_bytes"].as_u64().unwrap() > 0 && out["cache"]["host_bytes"].as_u64().unwrap() > 0);
    let specache = &out["specache"];
    for share in ["hit_rate", "acceptance"] {
        assert!((0.0..=1.0).contains(&specache[share].as_f64().unwrap()), "{share}: {out}");
    }
    assert_eq!(specache["hit_rate_per_layer"].as_array().unwrap().len(), 4);
    assert!(specache["fetched_bytes_per_step"].as_f64().unwrap() > 0.0);
    assert!(specache["exposed_us_per_step"].as_f64().is_some());
}

#[test]
fn figures_that_do_not_apply_are_null() {
    let out = generate_json(&["-p", PROMPT, "-n", "1", "--kv", "full"]);
    assert!(out["specache"].as_object().unwrap().values().all(Value::is_null), "{out}");
    assert!(out["timings"]["decode_tok_s"].is_null(), "one token needs no decode step: {out}");
    let ids = file(&folder("null"), "ids.json", format!("{:?}", (0..300).collect::<Vec<_>>()));
    let out = stdout(&["generate", "-m", "synthetic:tiny", "--tokens", &ids, "-n", "8", "--json"]);
    let out: Value = serde_json::from_str(&out).unwrap();
    let specache = &out["specache"];
    assert!(specache["hit_rate"].is_null() && specache["acceptance"].is_null() && out["text"].is_null(), "{out}");
    assert!(specache["fetched_bytes_per_step"].as_f64().unwrap() > 0.0, "{out}");
}

#[test]
fn ids_stream_where_there_is_no_tokenizer() {
    let ids = file(&folder("ids"), "ids.json", "[1, 2, 3]");
    let args = ["generate", "-m", "synthetic:tiny", "--tokens", &ids, "-n", "6", "--ignore-eos"];
    let streamed: Vec<u64> = stdout(&args).split_whitespace().map(|id| id.parse().unwrap()).collect();
    let out: Value = serde_json::from_str(&stdout(&[&args[..], &["--json"]].concat())).unwrap();
    assert_eq!((streamed.len(), &serde_json::json!(streamed)), (6, &out["tokens"]));
    assert_eq!(out["prompt_tokens"], 3, "nothing is added");
}

#[test]
fn greedy_tokens_of_full_and_offload_are_the_same() {
    let ids = path(fixture("golden/ids.json"));
    let tokens = |kv| generate_json(&["--tokens", &ids, "-n", "80", "--kv", kv, "--ignore-eos"])["tokens"].clone();
    assert_eq!(tokens("full"), tokens("offload"));
}

#[test]
fn seeds() {
    let sample = |seed| generate(&["-p", PROMPT, "-n", "24", "--temp", "1.5", "--ignore-eos", "-s", seed]);
    assert_eq!(sample("1"), sample("1"));
    assert_ne!(sample("1"), sample("2"));
    let cold = generate(&["-p", PROMPT, "-n", "24", "--temp", "0", "-s", "7"]);
    assert_eq!(cold, generate(&["-p", PROMPT, "-n", "24"]));
}

/// A copy of the recall model whose end of text is the full stop.
#[test]
fn end_of_text_is_a_token_but_no_text() {
    let folder = folder("eos");
    for entry in fs::read_dir(fixture("recall")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    fs::write(folder.join("generation_config.json"), r#"{"eos_token_id": [1, 15], "do_sample": false}"#).unwrap();
    let args = ["generate", "-m", &path(&folder), "-p", PROMPT, "-n", "12"];
    assert_eq!(stdout(&args), " zesi rere bago");
    let out: Value = serde_json::from_str(&stdout(&[&args[..], &["--json"]].concat())).unwrap();
    assert_eq!((&out["stop_reason"], out["text"].as_str()), (&"eos".into(), Some(" zesi rere bago")));
    assert_eq!(out["tokens"].as_array().unwrap().last().unwrap(), 15);
    assert!(stdout(&[&args[..], &["--ignore-eos"]].concat()).starts_with(" zesi rere bago."));
}

#[test]
fn the_environment_sets_options_and_the_command_line_wins() {
    let mut from_env = command(&["generate"]);
    from_env.env("SPECACHE_MODEL", recall()).env("SPECACHE_PROMPT", PROMPT).env("SPECACHE_N_PREDICT", "4");
    assert_eq!(from_env.output().unwrap().stdout, b" zesi rere bago.");
    from_env.args(["-n", "2"]);
    assert_eq!(from_env.output().unwrap().stdout, b" zesi rere");
    from_env.args(["-f", &file(&folder("env"), "prompt.txt", "Recall")]);
    assert!(from_env.output().unwrap().status.success(), "the file wins over SPECACHE_PROMPT");
}

// Logits.

#[test]
fn logits_are_the_golden_ones() {
    let name = "specache-b1-g64-R64-k16";
    let folder = folder("logits");
    let golden = |suffix: &str| path(fixture(&format!("golden/{name}.{suffix}")));
    let (npy_file, trace_file) = (path(folder.join("o.npy")), path(folder.join("selections.json")));
    let (ids, spec) = (path(fixture("golden/ids.json")), golden("spec.json"));
    let model = recall();
    let what = ["logits", "-m", &model, "--tokens", &ids, "--prefill", "300", "--spec-tokens", &spec];
    let kv = ["--kv", "specache", "--kv-bits", "1", "--kv-group", "64", "--kv-residual", "64", "--kv-top-k", "16"];
    let out = ["--trace-selections", &trace_file, "-o", &npy_file];
    assert_eq!(stdout(&[&what[..], &kv, &out].concat()), "");
    assert_eq!(names(&folder), ["o.npy", "selections.json"]);

    // Bounds as in tests/golden.rs.
    let d = Distance::between(&npy(&npy_file), &npy(golden("logits.npy")));
    assert!(d.max < 5e-2 && d.median < 5e-4 && d.first_row < 1e-4 && d.mean_kld < 1e-6, "{d:?}");

    let (ours, theirs): (Value, Value) = (json(&trace_file), json(golden("selections.json")));
    assert_eq!(ours["speculative"], json::<Value>(&spec));
    let sets = |trace: &Value| -> Vec<Value> {
        let steps = std::iter::once(&trace["pre_decode"]).chain(trace["steps"].as_array().unwrap());
        let layers = steps.flat_map(|step| step.as_array().unwrap());
        layers.flat_map(|layer| layer.as_array().unwrap().clone()).collect()
    };
    let (ours, theirs) = (sets(&ours), sets(&theirs));
    assert_eq!((ours.len(), theirs.len()), (800, 800));
    let other = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
    assert!(other <= 8, "{other} of 800 selections differ");
}

#[test]
fn a_trace_is_null_where_nothing_is_offloaded() {
    let folder = folder("null-trace");
    let ids = file(&folder, "ids.json", format!("{:?}", (0..140).collect::<Vec<_>>()));
    let (npy_file, trace_file) = (path(folder.join("o.npy")), path(folder.join("t.json")));
    let args = ["logits", "-m", "synthetic:tiny", "--tokens", &ids, "--prefill", "100"];
    stdout(&[&args[..], &["--trace-selections", &trace_file, "-o", &npy_file]].concat());
    let trace: Value = json(&trace_file);
    assert_eq!(trace["pre_decode"], serde_json::json!([[null, null], [null, null]]));
    assert!(trace["steps"][38][1][1].as_array().is_some(), "a page is offloaded at 128 tokens: {trace}");
    assert_eq!((npy(&npy_file).len(), npy(&npy_file)[0].len()), (40, 512));
}

#[test]
fn output_files_appear_whole_or_not_at_all() {
    let folder = folder("atomic");
    let ids = path(fixture("golden/ids.json"));
    let model = recall();
    let out = path(folder.join("o.npy"));
    let logits = |prefill: &'static str, options: &[&str], out: &str| {
        run(&[&["logits", "-m", &model, "--tokens", &ids, "--prefill", prefill, "-o", out], options].concat())
    };
    for (prefill, options, code) in [
        ("0", &[][..], 2),
        ("400", &[], 2),
        ("-3", &[], 2),
        ("399", &["--vram-budget", "1KiB"], 4),
        ("399", &["--kv", "full", "--trace-selections", "t.json"], 2),
        ("399", &["--spec-tokens", "/nowhere.json"], 1),
        ("10", &["--spec-tokens", &ids, "--kv-bits", "3"], 2),
    ] {
        let output = logits(prefill, options, &out);
        assert_eq!(output.status.code(), Some(code), "{options:?}: {output:?}");
        assert!(names(&folder).is_empty(), "{options:?}: {:?}", names(&folder));
    }
    let full = logits("398", &[], "/dev/full");
    let text = String::from_utf8_lossy(&full.stderr);
    assert!(full.status.code() == Some(1) && text.contains("/dev/full"), "{full:?}");
    let nowhere = logits("398", &[], "/nowhere/o.npy");
    assert_eq!(nowhere.status.code(), Some(2), "{nowhere:?}");
    assert_eq!(logits("398", &[], &path(&folder)).status.code(), Some(2), "a folder");
    fs::write(&out, "older").unwrap();
    assert_eq!(logits("0", &[], &out).status.code(), Some(2));
    assert_eq!(fs::read(&out).unwrap(), b"older");
    assert_eq!(logits("398", &[], &out).status.code(), Some(0));
    assert_eq!((npy(&out).len(), names(&folder)), (2, vec!["o.npy".to_string()]));
}

// Bad input.

#[test]
fn bad_arguments_are_usage_errors() {
    let model = recall();
    let bad = |options: &[&str], words: &[&str]| {
        assert_fails(&[&["generate", "-m", &model, "-n", "4"], options].concat(), 2, words);
    };
    bad(&[], &["--prompt", "--file", "--tokens"]);
    bad(&["-p", ""], &["prompt is empty"]);
    bad(&["-p", "x", "-f", "y"], &["only one of", "--prompt", "--file"]);
    bad(&["-p", "x", "--temp", "NaN"], &["--temp", "NaN"]);
    bad(&["-p", "x", "--temp", "-1"], &["--temp", "-1"]);
    bad(&["-p", "x", "--top-p", "1.5"], &["--top-p", "1.5"]);
    bad(&["-p", "x", "--kv", "magic"], &["magic", "specache", "offload"]);
    bad(&["-p", "x", "--kv-bits", "3"], &["--kv-bits 3", "1, 2 or 4"]);
    bad(&["-p", "x", "--kv-group", "48"], &["--kv-group 48", "32 or 64"]);
    bad(&["-p", "x", "--kv-top-k", "99999999999999"], &["--kv-top-k"]);
    bad(&["-p", "x", "--kv-dtype", "fp32"], &["fp32", "--kv full"]);
    bad(&["-p", PROMPT, "-c", "15"], &["--ctx-size 15", "12 tokens", "16"]);
    bad(&["-p", "x", "-t", "0"], &["--threads"]);
    bad(&["-p", "x", "--vram-budget", "much"], &["--vram-budget", "GiB"]);
    bad(&["-p", "x", "--wat"], &["--wat"]);
    bad(&["-p", "x", "--trace", "/nowhere/t.json"], &["--trace /nowhere/t.json", "no folder /nowhere"]);
    bad(&["-p", "x", "--trace", "/"], &["--trace /", "is a folder"]);
    let plot = ["bench", "--overlap", "-m", "synthetic:tiny", "--plot", "/nowhere/p.svg"];
    assert_fails(&plot, 2, &["--plot /nowhere/p.svg", "no folder /nowhere"]);
    assert_fails(&["generate", "-p", "x", "-n", "1"], 2, &["--model"]);
    assert_fails(&["generate", "-m", &model, "-p", "x"], 2, &["--n-predict"]);
    for n in ["0", "-1", "99999999999999999999", "18446744073709551615", "9999999999"] {
        assert_fails(&["generate", "-m", &model, "-p", "x", "-n", n], 2, &[]);
    }
    assert_eq!(run(&[]).status.code(), Some(2));
    assert_fails(&["bench", "-m", "synthetic:tiny", "-r", "0"], 2, &["-r 0"]);
    assert_fails(&["bench", "-m", "synthetic:tiny", "-d", "18446744073709551615"], 2, &["-d", "at most"]);
    assert_fails(&["bench", "-m", &recall(), "-d", "20000000000"], 2, &["-d", "at most"]);
    assert_fails(&["bench", "-m", &recall(), "-b", "1048577"], 2, &["-b 1048577: at most 1048576 sequences"]);
}

#[test]
fn bad_lists_of_ids_are_named() {
    let folder = folder("bad-ids");
    let model = recall();
    let bad = |json: &str, words: &[&str]| {
        let ids = file(&folder, "ids.json", json);
        assert_fails(&["generate", "-m", &model, "-n", "4", "--tokens", &ids], 2, words);
        let out = path(folder.join("o.npy"));
        assert_fails(&["logits", "-m", &model, "--prefill", "1", "--tokens", &ids, "-o", &out], 2, &[]);
        assert_eq!(names(&folder), ["ids.json"]);
    };
    bad("[]", &["empty"]);
    bad("{\"ids\": [1]}", &["array"]);
    bad("[1, 2", &["not JSON"]);
    bad("[1, -2]", &["entry 1", "-2"]);
    bad("[1, 2, 2.5]", &["entry 2", "2.5"]);
    bad("[4294967296]", &["entry 0", "4294967296"]);
    bad("[1, \"two\"]", &["entry 1", "two"]);
    bad("[1, 5, 1536]", &["entry 2", "1536", "1535"]);
}

#[test]
fn bad_files_and_models() {
    let folder = folder("bad-files");
    let model = recall();
    let not_text = file(&folder, "latin1.txt", b"caf\xe9");
    assert_fails(&["generate", "-m", &model, "-n", "4", "-f", &not_text], 2, &["latin1.txt", "UTF-8", "3"]);
    assert_fails(&["generate", "-m", &model, "-n", "4", "-f", "/nowhere.txt"], 1, &["-f /nowhere.txt: "]);
    assert_fails(&["generate", "-m", "/nowhere", "-n", "4", "-p", "x"], 3, &["/nowhere"]);
    assert_fails(&["generate", "-m", "synthetic:huge", "-n", "4", "-p", "x"], 2, &["huge", "tiny"]);
    let no_tokenizer = path(fixture("hf/llama_gqa"));
    let full = ["generate", "-m", &no_tokenizer, "-n", "4", "--kv", "full"];
    assert_fails(&[&full[..], &["-p", "x"]].concat(), 2, &["--tokens", "tokenizer"]);

    // The head size of this one is no multiple of 64.
    let ids = file(&folder, "ids.json", "[1, 2, 3]");
    let small_heads = ["generate", "-m", &no_tokenizer, "-n", "4", "--tokens", &ids, "--kv-group", "64"];
    assert_fails(&small_heads, 2, &["--kv-group 64", "head_dim"]);

    // A tokenizer of another model: its ids go beyond the vocabulary.
    for entry in fs::read_dir(&no_tokenizer).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    fs::copy(fixture("recall/tokenizer.json"), folder.join("tokenizer.json")).unwrap();
    assert_fails(&["generate", "-m", &path(&folder), "-n", "4", "-p", "x"], 3, &["tokenizer.json", "vocab_size"]);
}

#[test]
fn memory_is_refused_before_it_is_taken() {
    let model = recall();
    let generate = ["generate", "-m", &model, "-p", "x"];
    let start = Instant::now();
    let budget = ["-n", "4", "--vram-budget", "1KiB"];
    assert_fails(&[&generate[..], &budget].concat(), 4, &["device memory", "--vram-budget", "1024"]);
    let host = ["-n", "4000", "--host-kv-budget", "1KiB"];
    assert_fails(&[&generate[..], &host].concat(), 4, &["host memory", "--host-kv-budget"]);
    // 550 GB: of the memory that is free, and of a budget where more is.
    let absurd = ["-n", "268000000", "--kv", "full", "--vram-budget", "500GB"];
    assert_fails(&[&generate[..], &absurd].concat(), 4, &["out of", "bytes are available"]);
    let batch = ["bench", "--overlap", "-m", "synthetic:tiny", "-b", "40", "-d", "500", "--vram-budget", "1MiB"];
    assert_fails(&batch, 4, &["a batch of 40 KV caches", "-b, -d", "1048576 bytes are available", "--vram-budget"]);
    for sequences in ["3000", "1000000"] {
        let forks = ["bench", "-m", &model, "-b", sequences, "--vram-budget", "1GiB"];
        let refused = run(&forks);
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(refused.status.code() == Some(4) && said.contains(&format!("a batch of {sequences} caches")), "{said}");
        let prompts = ["bench", "-m", &model, "-p", "2000", "-n", "0", "-b", sequences, "--vram-budget", "1GiB"];
        let refused = run(&prompts);
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(
            refused.status.code() == Some(4) && said.contains(&format!("a batch of {sequences} KV caches")),
            "{said}"
        );
    }
    assert!(start.elapsed() < Duration::from_secs(20));
}

/// The models ahead of a name that is wrong are not measured, and a mode that is named twice is measured once.
#[test]
fn bench_looks_at_its_names_first() {
    let both = format!("{},nope", recall());
    let args = ["bench", "-m", &both, "-n", "1", "-r", "1", "--kv", "full,full"];
    assert_fails(&args, 3, &["nope"]);
    let model = recall();
    let table = stdout(&["bench", "-m", &model, "-n", "1", "-r", "1", "-d", "50", "--kv", "full,full"]);
    assert_eq!(table.matches("| full ").count(), 1, "{table}");
}

// Ends from outside.

/// Starts a generation that would go on for a minute, and waits for its first text.
fn endless(options: &[&str]) -> Child {
    let args = ["generate", "-m", &recall(), "-p", PROMPT, "-n", "200000", "--ignore-eos"];
    let mut child = command(&args).args(options).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let begun = child.stdout.as_mut().unwrap().read_exact(&mut [0; 5]);
    assert!(begun.is_ok(), "{begun:?}: {}", stderr(&mut child));
    child
}

/// The slices of a Chrome trace, and the names of its rows.
fn slices_and_rows(file: &str) -> (Vec<Value>, Vec<String>) {
    let trace: Value = json(file);
    let events = trace["traceEvents"].as_array().unwrap();
    let of = |ph: &str| events.iter().filter(|event| event["ph"] == ph).cloned().collect::<Vec<_>>();
    let rows = of("M").into_iter().filter_map(|event| event["args"]["name"].as_str().map(str::to_string));
    (of("X"), rows.collect())
}

fn stderr(child: &mut Child) -> String {
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    text
}

fn interrupt(child: &Child) {
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
}

#[test]
fn a_closed_pipe_ends_it_quietly() {
    let mut child = endless(&[]);
    let start = Instant::now();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(60));
    assert!(!stderr(&mut child).contains("error"));
}

#[test]
fn ctrl_c_stops_a_generation() {
    let mut child = endless(&[]);
    let start = Instant::now();
    interrupt(&child);
    let mut rest = String::new();
    child.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(start.elapsed() < Duration::from_secs(60));
    // On a line of its own, where both streams go to one place.
    assert!(stderr(&mut child).contains("\nerror: interrupted"));
}

/// A trace is there to see why a run failed, so it is written all the same.
#[test]
fn a_run_that_ends_early_leaves_its_trace() {
    let folder = folder("early-trace");
    let file = path(folder.join("trace.json"));
    let mut child = endless(&["--trace", &file]);
    interrupt(&child);
    drop(child.stdout.take());
    let code = child.wait().unwrap().code();
    let (slices, rows) = slices_and_rows(&file);
    assert!(slices.iter().any(|slice| slice["name"] == "attend" && slice["args"]["schedule"] == "event"), "{code:?}");
    assert!(rows.iter().any(|row| row == "compute"), "{rows:?}");
    assert_eq!(names(&folder), ["trace.json"]);
}

/// The table, the picture and the trace of `bench --overlap` call things by the same names; picture and trace are
/// written though nobody reads the table.
#[test]
fn overlap_is_told_in_three_ways() {
    let folder = folder("overlap");
    let (plot, trace) = (path(folder.join("plot.svg")), path(folder.join("trace.json")));
    let args = ["bench", "--overlap", "-m", "synthetic:tiny", "-d", "300", "-n", "3", "-r", "1", "-b", "2"];
    let args = [&args[..], &["--sim-pcie-gbps", "0.05", "--plot", &plot, "--trace", &trace]].concat();
    let text = stdout(&args);
    let picture = fs::read_to_string(&plot).unwrap();
    for name in ["attention", "projections and MLP", "exposed wait", "gather", "copy-in"] {
        assert!(text.contains(&format!(" {name} |")), "no column {name}: {text}");
        assert!(picture.contains(&format!(">{name}</text>")), "no legend {name}");
    }
    let (slices, rows) = slices_and_rows(&trace);
    for row in ["compute", "gather", "copy-in", "copy-out"] {
        assert!(rows.iter().any(|name| name == row), "{rows:?}");
        assert!(picture.contains(&format!(">{row}</text>")), "no row {row}");
    }
    assert!(rows.iter().any(|name| name.starts_with("gather, node ")), "{rows:?}");
    for schedule in ["serial", "stream", "event"] {
        assert!(slices.iter().any(|slice| slice["args"]["schedule"] == schedule), "{schedule}");
        assert!(picture.contains(&format!(">{schedule}: ")));
    }

    fs::remove_file(&plot).unwrap();
    fs::remove_file(&trace).unwrap();
    let mut child = command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0), "{}", stderr(&mut child));
    assert_eq!(names(&folder), ["plot.svg", "trace.json"]);
}

/// What the only step of a schedule launches is counted for it, though the link is so slow that it arrives long behind it.
#[test]
fn overlap_counts_what_ends_behind_the_step() {
    let args = ["bench", "--overlap", "-m", "synthetic:tiny", "-d", "300", "-n", "1", "-r", "1", "--no-delta"];
    let text = stdout(&[&args[..], &["--sim-copy-latency-us", "3000"]].concat());
    let layers = text.lines().filter(|line| line.starts_with(['|']) && line.ends_with("B |"));
    let fetched: Vec<&str> = layers.map(|line| line.trim_end_matches('|').rsplit('|').next().unwrap().trim()).collect();
    assert!(fetched.len() == 2 && fetched[0] == fetched[1] && fetched[0] != "0 B", "{fetched:?} in {text}");
}

/// Whatever a step launches is of that step, the page that leaves at its end too.
#[test]
fn every_slice_belongs_to_a_step() {
    let trace = path(folder("slices").join("trace.json"));
    let args = ["bench", "--overlap", "-m", "synthetic:tiny", "-d", "300", "-n", "30", "-r", "1", "--trace", &trace];
    stdout(&args);
    let (slices, _) = slices_and_rows(&trace);
    assert!(slices.iter().all(|slice| slice["args"]["step"].as_u64().unwrap() > 0));
    // 90 steps: at least one page of each of two layers leaves.
    let count = |name: &str| slices.iter().filter(|slice| slice["name"] == name).count();
    assert!(count("pack") >= 2 && count("page out") >= 1, "{} and {}", count("pack"), count("page out"));
}

#[test]
fn ctrl_c_leaves_no_half_written_file() {
    let folder = folder("ctrl-c");
    let outputs = folder.join("out");
    fs::create_dir(&outputs).unwrap();
    let ids = file(&folder, "ids.json", format!("{:?}", (0..60_000).map(|i| i % 512).collect::<Vec<_>>()));
    let (npy_file, trace_file) = (path(outputs.join("o.npy")), path(outputs.join("t.json")));
    let args = ["logits", "-m", "synthetic:tiny", "--tokens", &ids, "--prefill", "10", "-o", &npy_file];
    let mut child = command(&args).args(["--trace-selections", &trace_file]).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while names(&outputs).len() < 2 {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?}: {}", stderr(&mut child));
        assert!(start.elapsed() < Duration::from_secs(20), "no files");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!names(&outputs).contains(&"o.npy".to_string()), "no name before it is complete");
    std::thread::sleep(Duration::from_millis(100));
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130), "{}", stderr(&mut child));
    assert!(names(&outputs).is_empty(), "{:?}", names(&outputs));
}

// The rest.

#[test]
fn bench_prints_all_modes() {
    let text = stdout(&["--bench", "-m", "synthetic:tiny", "-n", "4", "-r", "1", "-d", "300"]);
    for word in
        ["| full ", "| kivi ", "| offload ", "| fetch ", "| specache ", "CPU, ", "no CUDA device", "GB/s", "n/a"]
    {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
}

/// Forks share the complete host pages of the first, and the report says that they do.
#[test]
fn bench_with_forks_takes_host_memory_once() {
    let args = ["bench", "-m", "synthetic:tiny", "-n", "2", "-r", "1", "-d", "1000", "-b", "4", "--kv", "specache"];
    let json = |more: &[&str]| -> Value {
        serde_json::from_str(&stdout(&[&args[..], &["-o", "json"], more].concat())).unwrap()
    };
    let (own, forks) = (json(&[]), json(&["--forks"]));
    let bytes = |out: &Value, name: &str| out["models"][0]["modes"][0][name].as_u64().unwrap();
    assert!(own["models"][0]["forks"] == false && forks["models"][0]["forks"] == true, "{own} {forks}");
    assert_eq!(bytes(&own, "device_bytes"), bytes(&forks, "device_bytes"));
    // 1,000 tokens of 2 layers and 2 KV heads: 15 of 16 pages and more are complete.
    let (own, forks) = (bytes(&own, "host_bytes"), bytes(&forks, "host_bytes"));
    assert!(own > 3 * forks && forks > own / 4, "{own}, {forks}");
    let table = stdout(&[&args[..], &["--forks"]].concat());
    assert!(table.contains("4 forks of one sequence, with its host pages in common"), "{table}");
    let refused = |more: &[&str], said: &[&str]| {
        assert_fails(&[&["bench", "-m", "synthetic:tiny", "--forks"], more].concat(), 2, said);
    };
    refused(&[], &["--forks", "-b 2"]);
    refused(&["-b", "2", "-n", "0", "-p", "100"], &["--forks", "-n 0"]);
    refused(&["-b", "2", "--overlap"], &["--forks", "--overlap"]);
    refused(&["--simulate"], &["--forks", "has no effect"]);
}

#[test]
fn bench_json_has_every_repetition() {
    let args = ["bench", "-m", &recall(), "-n", "4", "-r", "2", "--kv", "full,specache", "-o", "json"];
    let out: Value = serde_json::from_str(&stdout(&args)).unwrap();
    assert!(out["hardware"]["threads"].as_u64().unwrap() > 0 && out["version"].is_string(), "{out}");
    // Why it is this device is another matter.
    let hardware = &out["hardware"];
    assert!(hardware["device"].as_str().is_some_and(|device| !device.contains("no CUDA device")), "{out}");
    assert!(hardware["gpu"] == true || hardware["why_no_gpu"].is_string(), "{out}");
    let modes = out["models"][0]["modes"].as_array().unwrap();
    assert_eq!(modes.len(), 2);
    for mode in modes {
        assert_eq!(mode["decode_tok_s"]["repetitions"].as_array().unwrap().len(), 2);
        assert!(mode["prefill_tok_s"].as_f64().unwrap() > 0.0 && mode["ratio_to_full"].as_f64().unwrap() > 0.0);
    }
    assert!(modes[0]["hit_rate"].is_null() && modes[1]["hit_rate"].as_f64().unwrap() > 0.0, "{out}");
}

/// Results that were kept say what they are of.
#[test]
fn json_names_model_and_mode() {
    let args =
        ["generate", "-m", "synthetic:tiny", "--tokens", "-", "-n", "2", "--kv", "kivi", "--kv-bits", "1", "--json"];
    let mut child = command(&args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"[1, 2, 3]").unwrap();
    let out: Value = serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!((&out["model"], &out["kv"]), (&"synthetic:tiny".into(), &"kivi".into()), "{out}");
    assert_eq!(out["bits_group_residual_top_k"], "1/64/64/-");
}

#[test]
fn a_prompt_from_standard_input() {
    let model = recall();
    let args = ["generate", "-m", &model, "-n", "4", "--kv", "full"];
    let prompt = fs::read_to_string(fixture("recall_prompt.txt")).unwrap();
    let mut child = command(&[&args[..], &["-f", "-"]].concat())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), prompt.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let file = fixture("recall_prompt.txt");
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        stdout(&[&args[..], &["-f", file.to_str().unwrap()]].concat())
    );
}

/// Lists of depths and batches are a grid; every format has all of it, and a picture shows it.
#[test]
fn bench_grids_prompts_and_formats() {
    let plot = Path::new(env!("CARGO_TARGET_TMPDIR")).join("grid.svg");
    let _ = fs::remove_file(&plot);
    let grid = ["bench", "-m", "synthetic:tiny", "-d", "70,200", "-b", "1,3", "-p", "90", "-n", "2", "-r", "2"];
    let run = |rest: &[&str]| stdout(&[&grid[..], &["--kv", "full,specache"], rest].concat());

    let text = run(&["--plot", plot.to_str().unwrap()]);
    assert_eq!(text.matches("tokens in the cache").count(), 4, "{text}");
    assert!(
        text.contains("a prompt of 90 tokens, 2 times") && text.contains("3 prompts together, each of 90"),
        "{text}"
    );
    let svg = fs::read_to_string(&plot).unwrap();
    assert!(svg.contains("tiny, 200 tokens, batch 3") && svg.ends_with("</svg>\n"), "{svg}");

    let csv = run(&["-o", "csv"]);
    let rows: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    let columns = rows[0].len();
    assert!(rows[0].contains(&"tok_s") && rows.len() == 1 + 2 * 2 + 4 * 2, "{csv}");
    // Devices have commas in their names, within quotes.
    assert!(
        csv.lines()
            .skip(1)
            .all(|line| line.split('"').step_by(2).map(|part| part.matches(',').count()).sum::<usize>() == columns - 1),
        "{csv}"
    );

    let lines = run(&["-o", "jsonl"]);
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().filter(|line| line["test"] == "prompt").count(), 2);
    let decoded: Vec<_> = lines.iter().filter(|line| line["test"] == "decode").collect();
    let points = [(70, 1), (70, 3), (200, 1), (200, 3)].map(|(depth, batch)| serde_json::json!([depth, batch]));
    assert_eq!(
        decoded.iter().map(|line| serde_json::json!([line["depth"], line["batch"]])).collect::<Vec<_>>(),
        points
    );
    assert!(lines.iter().all(|line| line["hardware"]["threads"].as_u64() > Some(0)));

    let only_prompts = stdout(&["bench", "-m", "synthetic:tiny", "-p", "60", "-n", "0", "-r", "1", "-o", "json"]);
    let only_prompts: Value = serde_json::from_str(&only_prompts).unwrap();
    assert!(only_prompts["models"].as_array().unwrap().is_empty());
    assert_eq!(only_prompts["prompts"][0]["modes"].as_array().unwrap().len(), 5);

    assert_fails(&["bench", "-m", "synthetic:tiny", "-n", "0"], 2, &["-n 0", "-p"]);
    assert_fails(&["bench", "-m", "synthetic:tiny", "-d", "10,0"], 2, &["-d 0"]);
    assert_fails(&["bench", "--overlap", "-m", "synthetic:tiny", "-d", "10,20"], 2, &["--overlap", "one depth"]);
}

/// Trained weights have a KL divergence from `full`: nothing for `full` itself and for whole 16-bit layers, something for one bit.
#[test]
fn bench_measures_divergence() {
    let args = ["bench", "-m", &recall(), "-d", "700", "-n", "2", "-r", "1", "--kv-bits", "1", "-o", "json"];
    let out: Value = serde_json::from_str(&stdout(&args)).unwrap();
    let kld = |mode: &str| {
        let modes = out["models"][0]["modes"].as_array().unwrap();
        modes.iter().find(|m| m["mode"] == mode).unwrap()["kld"].as_f64().unwrap()
    };
    assert!(kld("full") == 0.0 && kld("offload") < 1e-6, "{out}");
    assert!(kld("kivi") > 10.0 * kld("offload") && kld("specache") < kld("kivi"), "{out}");
    let random = stdout(&["bench", "-m", "synthetic:tiny", "-d", "70", "-n", "2", "-r", "1", "-o", "json"]);
    let random: Value = serde_json::from_str(&random).unwrap();
    assert!(random["models"][0]["modes"][0]["kld"].is_null(), "{random}");
}

#[test]
fn help_and_version() {
    assert!(stdout(&["--version"]).starts_with("specache-engine 0."));
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let nobody_reads_it = command(&["--help"]).stdout(full).status().unwrap();
    assert_eq!(nobody_reads_it.code(), Some(1));
    let help = stdout(&["--help"]);
    assert!(
        help.contains("--bench") && help.contains("SPECACHE_CHECK_ORDER") && help.contains("SPECACHE_ISA"),
        "{help}"
    );
    for (command, option) in [("generate", "--kv-top-k"), ("logits", "--trace-selections"), ("bench", "--repetitions")]
    {
        let help = stdout(&[command, "--help"]);
        assert!(help.contains("Examples:") && help.contains(option) && help.contains("SPECACHE_"), "{help}");
    }
}

/// Every row of the simulation: `event` is never slower than the others and reaches the bound.
#[test]
fn simulated_schedules_are_in_order() {
    let text = stdout(&["bench", "--simulate", "--gpu", "a6000", "-m", "synthetic:llama-3-8b", "-d", "32768"]);
    assert!(text.starts_with("Simulated, not measured"), "{text}");
    let rows = text.lines().filter(|line| line.starts_with("| 32768"));
    let numbers = |row: &str| row.split('|').filter_map(|cell| cell.trim().parse().ok()).collect::<Vec<f64>>();
    let rows: Vec<Vec<f64>> = rows.map(numbers).collect();
    assert!(rows.len() >= 3, "{text}");
    for row in rows {
        let [_, _, _, _, bound, serial, stream, event] = row[..] else { panic!("{row:?}") };
        assert!(bound - 0.01 <= event && event <= stream && stream <= serial && event <= 1.03 * bound, "{row:?}");
    }
    assert_fails(&["bench", "--simulate", "--gpu", "voodoo"], 2, &["voodoo"]);
    // A variable for `plan` is not in the way of measuring.
    let measured = ["bench", "-m", "synthetic:tiny", "-n", "1", "-r", "1", "-d", "10", "--kv", "full"];
    assert!(command(&measured).env("SPECACHE_GPU", "a6000").output().unwrap().status.success());
    assert_fails(&[&measured[..], &["--gpu", "a6000"]].concat(), 2, &["--gpu", "--simulate"]);
    let by_variable = command(&["bench", "--simulate", "-d", "8192"]).env("SPECACHE_GPU", "a6000").output().unwrap();
    assert_eq!(
        String::from_utf8(by_variable.stdout).unwrap(),
        stdout(&["bench", "--simulate", "-d", "8192", "--gpu", "a6000"])
    );
    for typed in ["--repetitions=3", "--n-predict=4", "--vram-budget=1GiB", "--device=cpu", "--no-delta", "--threads=1"]
    {
        let name = typed.split('=').next().unwrap();
        assert_fails(&["bench", "--simulate", typed], 2, &[name, "has no effect"]);
    }
}

/// The README's example: 1-bit KIVI has forgotten what is asked for, 1-bit SpeCache has not.
#[test]
fn one_bit_forgets_and_specache_remembers() {
    let prompt = common::fixture("recall_prompt.txt").display().to_string();
    let say = |kv: &[&str]| generate(&[&["-f", &prompt, "-n", "4"], kv].concat());
    assert_eq!(say(&["--kv", "full"]), " fimi maga losu.");
    assert_eq!(say(&["--kv", "kivi", "--kv-bits", "1"]), " fimi losu losu.");
    assert_eq!(say(&["--kv", "specache", "--kv-bits", "1", "--kv-top-k", "16"]), " fimi maga losu.");
}

/// `-n -1`, which means "no limit" elsewhere, and the like: told by the option's name, with what would be right.
#[test]
fn what_is_no_count_is_told_with_the_fix() {
    let model = recall();
    let generate = ["generate", "-m", &model, "-p", "x", "-n", "4"];
    let below = "it cannot be below zero; give a whole number, such as 64";
    for (args, option, why) in [
        (&["generate", "-m", &model, "-p", "x", "-n", "-1"][..], "'-1' for '--n-predict <N>'", below),
        (&["generate", "-m", &model, "-p", "x", "-n", "-1.5"], "'-1.5' for '--n-predict <N>'", below),
        (&["generate", "-m", &model, "-p", "x", "-n", "many"], "'many' for '--n-predict", "must be a whole number"),
        (&["generate", "-m", &model, "-p", "x", "-n", "4e30"], "'4e30' for '--n-predict", "must be a whole number"),
        (&["generate", "-m", &model, "-p", "x", "-n", "99999999999999999999"], "--n-predict", "give a smaller one"),
        (&[&generate[..], &["--kv-top-k", "-1"]].concat(), "'-1' for '--kv-top-k <K>'", below),
        (&[&generate[..], &["--top-k", "-1"]].concat(), "'-1' for '--top-k <K>'", below),
        (&[&generate[..], &["-s", "-1"]].concat(), "'-1' for '--seed <SEED>'", below),
        (&[&generate[..], &["--vram-budget", "-1"]].concat(), "'-1' for '--vram-budget <SIZE>'", "a size is"),
        (&["chat", "-m", &model, "-n", "-1"], "'-1' for '--n-predict <N>'", below),
        (&["plan", "-m", &model, "-b", "-1"], "'-1' for '--batch <B>'", below),
        (&["bench", "-r", "-3"], "'-3' for '--repetitions <R>'", below),
        (&["bench", "-d", "100,-5"], "'-5' for '--depth <TOKENS,...>'", below),
        (&["eval", "longbench", "-m", &model, "--data", "x", "--limit", "-1"], "'-1' for '--limit <N>'", below),
    ] {
        assert_fails(args, 2, &[option, why]);
    }
    let by_variable = command(&generate[..5]).env("SPECACHE_N_PREDICT", "-1").output().unwrap();
    let said = String::from_utf8(by_variable.stderr).unwrap();
    assert!(by_variable.status.code() == Some(2) && said.contains("--n-predict") && said.contains(below), "{said}");
}

/// An output never takes the place of an input.
#[test]
fn logits_do_not_overwrite_their_input() {
    let folder = folder("same");
    let ids = file(&folder, "ids.json", "[1, 2, 3, 4]");
    let before = std::fs::read(&ids).unwrap();
    let args = ["logits", "-m", &recall(), "--tokens", &ids, "--prefill", "2", "-o", &ids];
    assert_fails(&args, 2, &["--tokens and --output name the same file"]);
    assert_eq!(std::fs::read(&ids).unwrap(), before);
}

/// Nor does any other, in any command, whatever the file is called there; and none takes the place of another, or one in the
/// model's folder.
#[test]
fn no_output_takes_the_place_of_what_is_read() {
    let folder = folder("places");
    let model = folder.join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(fixture("recall")).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    let ids = file(&folder, "ids.json", format!("{:?}", (10..110).collect::<Vec<_>>()));
    let text = file(&folder, "text.txt", PROMPT);
    let link = path(folder.join("link.txt"));
    std::os::unix::fs::symlink(&text, &link).unwrap();
    let [new, config, trace] = ["new.svg", "model/config.json", "model/trace.json"].map(|name| path(folder.join(name)));
    let folders = [&folder, &model].map(|folder| (names(folder), folder));
    let model = path(&model);
    let kld = ["eval", "kld", "-m", &model, "--tokens", &ids, "-c", "100"];
    let needle = ["eval", "needle", "-m", &model, "--haystack", &text];
    let generate = ["generate", "-m", &model, "-f", &text, "-n", "1"];
    for (command, options, words) in [
        (&kld[..], &["--plot", &ids][..], ["--tokens and --plot name the same file", "ids.json"]),
        (&needle, &["--plot", &link], ["--haystack and --plot name the same file", "link.txt"]),
        (&generate, &["--trace", &link], ["--file and --trace name the same file", "link.txt"]),
        (&generate, &["--trace", &config], ["model/config.json: is a file of ", "which --model reads"]),
        (&generate, &["--trace", &trace], ["model/trace.json: is a file of ", "which --model reads"]),
        (&kld, &["--plot", &new, "--output", &new], ["--output and --plot name the same file", "new.svg"]),
        (&kld, &["--plot", &new, "--trace", &new], ["--plot and --trace name the same file", "new.svg"]),
    ] {
        assert_fails(&[command, options].concat(), 2, &words);
        let by_variable = common::command(command).env("SPECACHE_TRACE", &text).env("SPECACHE_PLOT", &ids).output();
        assert_eq!(by_variable.unwrap().status.code(), Some(2), "{command:?}");
    }
    folders.iter().for_each(|(before, folder)| assert_eq!(names(folder), *before));
    assert_eq!(fs::read_to_string(&text).unwrap(), PROMPT);
    // What is no file loses nothing.
    assert!(run(&[&generate[..], &["--trace", "/dev/null"]].concat()).status.success());
}

/// A flag's variable says yes or no, and nothing else; a variable that is wrong is named.
#[test]
fn a_wrong_variable_is_named() {
    let args = ["generate", "-m", &recall(), "-p", "x", "-n", "1"];
    for (variable, value, words) in [
        ("SPECACHE_JSON", "maybe", &["'maybe'", "--json", "SPECACHE_JSON"][..]),
        ("SPECACHE_CHECK_ORDER", "maybe", &["SPECACHE_CHECK_ORDER=maybe", "yes"]),
        ("SPECACHE_KV", "foo", &["'foo'", "--kv", "SPECACHE_KV", "offload"]),
        ("SPECACHE_CTX_SIZE", "many", &["'many'", "--ctx-size", "SPECACHE_CTX_SIZE"]),
    ] {
        let output = command(&args).env(variable, value).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
    }
    let typed = command(&[&args[..], &["--kv", "foo"]].concat()).env("SPECACHE_KV", "full").output().unwrap();
    let said = String::from_utf8(typed.stderr).unwrap();
    assert!(said.contains("'foo' for '--kv <MODE>'") && !said.contains("SPECACHE"), "{said}");
    let yes = command(&args).env("SPECACHE_JSON", "On").output().unwrap();
    assert!(yes.stdout.starts_with(b"{"), "{yes:?}");
    for no in ["No", ""] {
        let no = command(&args).env("SPECACHE_JSON", no).env("SPECACHE_CHECK_ORDER", no).output().unwrap();
        assert!(no.status.success() && !no.stdout.starts_with(b"{"), "{no:?}");
    }
    // No list is taken where one number belongs.
    assert_fails(&[&args[..], &["--kv-bits", "1,2"]].concat(), 2, &["'1,2' for '--kv-bits", "no list"]);
}
