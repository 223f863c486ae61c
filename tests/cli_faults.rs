//! Bad input and bad luck on the command line: what is wrong is named, the exit code says of what kind it is, and nothing is left
//! half done. docs/testing.md lists every kind of fault with its tests; these are the ones that need the built binary.

mod common;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::tiny::Random;
use common::{command, fixture};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const PROMPT: &str = "The password of kose is zesi rere bago. Recall kose";

fn recall() -> String {
    fixture("recall").to_str().unwrap().to_string()
}

/// An empty folder for one test.
fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cli-faults-{test}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// The recall model in a folder of its own, for a test to damage.
fn copy(test: &str) -> PathBuf {
    let folder = folder(test);
    for entry in fs::read_dir(fixture("recall")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    folder
}

/// It ends with this code, and its last line on stderr is an error with these words.
#[track_caller]
fn assert_fails(output: &Output, code: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(text.contains("error: ") && !text.contains("internal error") && !text.contains("panicked"), "{text}");
    for word in words {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
}

#[track_caller]
fn fails(args: &[&str], code: i32, words: &[&str]) {
    assert_fails(&command(args).output().unwrap(), code, words);
}

// Model folders.

/// The commands that read a model all say what is wrong with one.
#[test]
fn a_broken_model_ends_every_command_with_3() {
    let dir = copy("broken");
    let model = dir.to_str().unwrap();
    let ids = dir.join("ids.json");
    fs::write(&ids, "[1, 2, 3]").unwrap();
    let item = r#"{"input":"Recall kose","context":"kose is zesi.","answers":["zesi"],"_id":"a"}"#;
    fs::write(dir.join("qasper.jsonl"), item).unwrap();
    let (ids, npy, hay) = (ids.to_str().unwrap(), dir.join("o.npy"), fixture("recall_prompt.txt"));
    let commands = [
        &["generate", "-m", model, "-p", "x", "-n", "2"][..],
        &["logits", "-m", model, "--tokens", ids, "--prefill", "1", "-o", npy.to_str().unwrap()],
        &["bench", "-m", model, "-n", "1", "-r", "1"],
        &["bench", "--overlap", "-m", model],
        &["chat", "--raw", "-m", model],
        &["eval", "ppl", "-m", model, "--tokens", ids],
        &["eval", "kld", "-m", model, "--tokens", ids],
        &["eval", "coverage", "-m", model, "--tokens", ids],
        &["eval", "needle", "-m", model, "--haystack", hay.to_str().unwrap()],
        &["eval", "longbench", "-m", model, "--data", model],
    ];
    let all = |words: &[&str]| commands.iter().for_each(|args| fails(args, 3, words));
    let config = fs::read(dir.join("config.json")).unwrap();
    fs::write(dir.join("config.json"), r#"{"model_type": "llama", "hidden_size": "wide"}"#).unwrap();
    all(&["config.json", "field hidden_size is \"wide\""]);
    fails(&["plan", "-m", model], 3, &["config.json", "field hidden_size is \"wide\""]);
    fails(&["bench", "--simulate", "-m", model], 3, &["config.json", "field hidden_size is \"wide\""]);
    fs::write(dir.join("config.json"), config).unwrap();
    let weights = fs::read(dir.join("model.safetensors")).unwrap();
    fs::write(dir.join("model.safetensors"), &weights[..weights.len() - 1]).unwrap();
    all(&["model.safetensors", "truncated"]);
    assert!(!npy.exists());
    fs::write(dir.join("model.safetensors"), weights).unwrap();
    // A file that the tokenizers crate does not refuse but panics at.
    let tokenizer = fs::read(fixture("fuzz/tokenizer/decoder_panics.json")).unwrap();
    fs::write(dir.join("tokenizer.json"), tokenizer).unwrap();
    fails(commands[0], 3, &["tokenizer.json", "not a usable tokenizer"]);
    commands[4..].iter().for_each(|args| fails(args, 3, &["tokenizer.json", "not a usable tokenizer"]));
}

#[test]
fn nan_in_a_weight_is_named_by_its_layer() {
    let dir = copy("nan");
    let file = dir.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let start = json["model.layers.2.mlp.up_proj.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + header + start..][..4].fill(0xff); // NaN in bf16, fp16 and fp32
    fs::write(&file, bytes).unwrap();
    let model = dir.to_str().unwrap();
    fails(&["generate", "-m", model, "-p", PROMPT, "-n", "4"], 1, &["layer 2", "NaN"]);
    let (ids, npy) = (dir.join("ids.json"), dir.join("o.npy"));
    fs::write(&ids, "[1, 2, 3]").unwrap();
    let args =
        ["logits", "-m", model, "--tokens", ids.to_str().unwrap(), "--prefill", "2", "-o", npy.to_str().unwrap()];
    fails(&args, 1, &["layer 2", "NaN"]);
    assert!(!npy.exists());
}

#[test]
fn a_template_without_an_end_ends() {
    let dir = copy("endless");
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    fs::write(dir.join("chat_template.jinja"), endless).unwrap();
    let start = Instant::now();
    let mut child =
        command(&["chat", "-m", dir.to_str().unwrap()]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"Hello\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_fails(&output, 3, &["chat_template.jinja", "too long"]);
    assert!(start.elapsed() < Duration::from_secs(20));
}

/// What a model's file says is shown in a terminal's own colours, and briefly.
#[test]
fn a_model_does_not_write_to_the_terminal() {
    let dir = copy("escapes");
    let name = format!("\u{1b}[2J\u{1b}]0;title\u{7}{}", "x".repeat(100_000));
    fs::write(dir.join("model.safetensors"), {
        let header = serde_json::json!({ name: {"dtype": "F64", "shape": [1], "data_offsets": [3, 11]} }).to_string();
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 11]].concat()
    })
    .unwrap();
    let output = command(&["generate", "-m", dir.to_str().unwrap(), "-p", "x", "-n", "1"]).output().unwrap();
    assert_fails(&output, 3, &["model.safetensors", "\\u{1b}[2J"]);
    assert!(output.stderr.len() < 4000 && !output.stderr.contains(&0x1b), "{}", output.stderr.len());
}

// Prompts.

#[test]
fn prompts_that_are_none() {
    let model = recall();
    let start = ["generate", "-m", &model, "-n", "4"];
    for (prompt, code, words) in [
        (["-p", ""], 2, &["prompt is empty"][..]),
        (["-f", "/dev/null"], 2, &["-f /dev/null", "is empty"]),
        (["-f", "/dev/zero"], 2, &["/dev/zero", "more than 268435456 bytes"]),
        (["--tokens", "/dev/zero"], 2, &["/dev/zero", "more than 268435456 bytes"]),
        (["-f", "/"], 1, &["/: "]),
    ] {
        fails(&[&start[..], &prompt].concat(), code, words);
    }
    let mut latin = command(&start);
    latin.arg("-p").arg(OsStr::from_bytes(b"caf\xe9"));
    assert_fails(&latin.output().unwrap(), 2, &["UTF-8"]);
    let mut from_env = command(&start);
    from_env.env("SPECACHE_PROMPT", OsStr::from_bytes(b"caf\xe9"));
    assert_fails(&from_env.output().unwrap(), 2, &["UTF-8"]);
}

/// A prompt for which there is no memory is refused before anything is computed.
#[test]
fn a_huge_prompt_is_refused_at_once() {
    let folder = folder("huge");
    let (text, ids) = (folder.join("book.txt"), folder.join("ids.json"));
    fs::write(&text, "In the morning there was a letter. ".repeat(20_000)).unwrap();
    fs::write(&ids, format!("{:?}", vec![5; 1_000_000])).unwrap();
    let model = recall();
    let budget = ["generate", "-m", &model, "-n", "4", "--host-kv-budget", "8MiB"];
    let start = Instant::now();
    fails(&[&budget[..], &["-f", text.to_str().unwrap()]].concat(), 4, &["host memory", "--host-kv-budget", "8388608"]);
    fails(&[&budget[..], &["--tokens", ids.to_str().unwrap()]].concat(), 4, &["host memory", "--host-kv-budget"]);
    let context = ["-c", "1000", "-f", text.to_str().unwrap()];
    fails(&[&["generate", "-m", &model, "-n", "4"], &context[..]].concat(), 2, &["--ctx-size 1000", "260000 tokens"]);
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn numbers_beyond_all_reason() {
    let model = recall();
    for n in ["268435455", "9007199254740993", "18446744073709551615"] {
        let output =
            command(&["generate", "-m", &model, "-p", "x", "-n", n, "--vram-budget", "8GiB"]).output().unwrap();
        let code = output.status.code().unwrap();
        assert!(code == 2 || code == 4, "-n {n}: {output:?}");
        assert_fails(&output, code, &[]);
    }
    for (option, value) in
        [("--temp", "-0.1"), ("--temp", "inf"), ("--top-p", "NaN"), ("--min-p", "-1"), ("--repeat-penalty", "0")]
    {
        fails(&["generate", "-m", &model, "-p", "x", "-n", "2", option, value], 2, &[option]);
    }
}

// Devices and memory.

#[test]
fn no_driver_is_no_fault_unless_it_was_asked_for() {
    let folder = folder("driver");
    let stub = folder.join("libcuda.so");
    let gcc = Command::new("gcc").args(["-shared", "-x", "c", "/dev/null", "-o"]).arg(&stub).status().unwrap();
    assert!(gcc.success());
    let model = recall();
    for driver in [Path::new("/nowhere/libcuda.so"), &stub] {
        let run = |device: &str| {
            let mut command = command(&["generate", "-m", &model, "-p", PROMPT, "-n", "4", "--device", device]);
            command.env("SPECACHE_LIBCUDA", driver).output().unwrap()
        };
        let auto = run("auto");
        assert!(auto.status.success() && auto.stdout == b" zesi rere bago.", "{auto:?}");
        for device in ["cuda", "cuda:3"] {
            assert_fails(&run(device), 5, &[driver.to_str().unwrap()]);
        }
    }
    fails(&["generate", "-m", &model, "-p", "x", "-n", "2", "--device", "tpu"], 2, &["tpu", "cuda"]);
}

/// Memory that may not be locked is used as it is, with one warning that names the limit.
#[test]
fn a_limit_of_locked_memory_is_a_warning() {
    let prompt = fixture("recall_prompt.txt");
    let mut run = command(&["generate", "-m", &recall(), "-f", prompt.to_str().unwrap(), "-n", "4", "--mlock"]);
    without_the_right_to_lock(&mut run);
    limited(&mut run, Resource::RLIMIT_MEMLOCK, 64 << 10);
    let Ok(output) = run.output() else {
        println!("skipped: this process cannot give up its right to lock memory whatever its limit");
        return;
    };
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && output.stdout == b" fimi maga losu.", "{text}");
    assert_eq!(text.matches("RLIMIT_MEMLOCK is 65536 bytes").count(), 1, "{text}");
}

/// Root may lock without limit: a program that it starts may not, when that right is taken from all that it may ever have.
#[allow(unsafe_code)]
fn without_the_right_to_lock(command: &mut Command) {
    const CAP_IPC_LOCK: libc::c_ulong = 14;
    if nix::unistd::geteuid().is_root() {
        // SAFETY: one system call between fork and exec.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            })
        };
    }
}

#[allow(unsafe_code)]
fn limited(command: &mut Command, what: Resource, bytes: u64) {
    // SAFETY: one system call between fork and exec.
    unsafe { command.pre_exec(move || Ok(setrlimit(what, bytes, bytes)?)) };
}

/// A process that may have no more memory than this fails in words where it asks for large pieces.
#[test]
fn address_space_that_ends_is_told() {
    let ids = folder("address-space").join("ids.json");
    fs::write(&ids, "[1, 2, 3]").unwrap();
    let args = ["generate", "-m", "synthetic:llama-3.2-1b", "--tokens", ids.to_str().unwrap(), "-n", "2", "-t", "1"];
    let mut run = command(&args);
    limited(&mut run, Resource::RLIMIT_AS, 1 << 30);
    assert_fails(&run.output().unwrap(), 4, &["out of host memory", "bytes"]);
    let model = recall();
    let mut run = command(&["generate", "-m", &model, "-p", "x", "-n", "2000000", "--kv", "full", "-t", "1"]);
    limited(&mut run, Resource::RLIMIT_AS, 2 << 30);
    assert_fails(&run.output().unwrap(), 4, &["out of", "memory", "bytes"]);
}

// Full disks, closed pipes.

/// Everything that prints says that it could not, or that nobody reads any more.
#[test]
fn every_command_survives_its_stdout() {
    let dir = copy("stdout");
    fs::write(dir.join("chat_template.jinja"), "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    let model = dir.to_str().unwrap();
    let ids = dir.join("ids.json");
    fs::write(&ids, format!("{:?}", (0..100).collect::<Vec<_>>())).unwrap();
    let ids = ids.to_str().unwrap();
    let commands = [
        &["eval", "ppl", "-m", model, "--tokens", ids, "-c", "40", "--windows", "1"][..],
        &["eval", "ppl", "-m", model, "--tokens", ids, "-c", "40", "--windows", "1", "--json"],
        &["generate", "-m", model, "-p", PROMPT, "-n", "4"],
        &["generate", "-m", model, "-p", PROMPT, "-n", "4", "--json"],
        &["chat", "-m", model, "-n", "4"],
        &["plan", "-m", model],
        &["plan", "-m", model, "-o", "json"],
        &["doctor"],
        &["devices"],
        &["bench", "-m", "synthetic:tiny", "-n", "1", "-r", "1", "-d", "100", "--kv", "full"],
        &["bench", "-m", "synthetic:tiny", "-n", "1", "-r", "1", "-d", "100", "--kv", "full", "-o", "json"],
        &["bench", "--simulate"],
        &["completions", "bash"],
        &["man"],
    ];
    for args in commands {
        let run = |stdout: Stdio| {
            let mut child = command(args).stdin(Stdio::piped()).stdout(stdout).stderr(Stdio::piped()).spawn().unwrap();
            // One that has ended already does not read it.
            let _ = child.stdin.take().unwrap().write_all(format!("{PROMPT}\n").as_bytes());
            child
        };
        let full = run(File::options().write(true).open("/dev/full").unwrap().into()).wait_with_output().unwrap();
        assert_fails(&full, 1, &["standard output", "No space left on device"]);
        let mut child = run(Stdio::piped());
        drop(child.stdout.take());
        let closed = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&closed.stderr);
        assert!(closed.status.code() == Some(0) && !text.contains("error"), "{args:?}: {text}");
    }
}

/// A small file system of its own, where this process may have one.
#[test]
fn a_small_disk_that_fills_up() {
    let dir = folder("disk");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "none"]).arg(&dir).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        println!("skipped: no tmpfs may be mounted here; tests/system_faults.rs fails the writes themselves");
        return;
    }
    struct Mounted<'a>(&'a Path);
    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0).status();
        }
    }
    let _mounted = Mounted(&dir);
    let ids = folder("disk-ids").join("ids.json");
    fs::write(&ids, format!("{:?}", (0..90).collect::<Vec<_>>())).unwrap();
    let (ids, npy, trace) = (ids.to_str().unwrap(), dir.join("o.npy"), dir.join("t.json"));
    let args = ["logits", "-m", "synthetic:tiny", "--tokens", ids, "--prefill", "9", "-o", npy.to_str().unwrap()];
    fails(&args, 1, &["o.npy", "No space left on device"]);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    let args = ["generate", "-m", "synthetic:tiny", "--tokens", ids, "-n", "40", "--trace", trace.to_str().unwrap()];
    fails(&args, 1, &["t.json", "No space left on device"]);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
}

// Ctrl-C at any time.

/// Waits, but not for ever.
fn end(child: &mut Child) -> Option<i32> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if start.elapsed() > Duration::from_secs(30) {
            child.kill().unwrap();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Interrupted at random points from its first moment to its end, now and then twice: it ends with 130, or had ended; what
/// it printed or wrote is whole.
#[test]
fn ctrl_c_at_any_time_leaves_nothing_half_done() {
    let inputs = folder("ctrl-c-inputs");
    let (ids, long) = (inputs.join("ids.json"), inputs.join("long.json"));
    fs::write(&ids, format!("{:?}", (0..400).collect::<Vec<_>>())).unwrap();
    fs::write(&long, format!("{:?}", (0..3000).map(|i| i % 500).collect::<Vec<_>>())).unwrap();
    let outputs = folder("ctrl-c-outputs");
    let out = |name: &str| outputs.join(name).to_str().unwrap().to_string();
    let (npy, selections, trace, plot) = (out("o.npy"), out("s.json"), out("t.json"), out("p.svg"));
    let results = out("r.jsonl");
    let (ids, long, model) = (ids.to_str().unwrap(), long.to_str().unwrap(), recall());
    let commands = [
        &["generate", "-m", &model, "--tokens", ids, "-n", "60", "--json", "--ignore-eos", "--trace", &trace][..],
        &["generate", "-m", "synthetic:tiny", "--tokens", long, "-n", "20", "--json"],
        &[
            "logits",
            "-m",
            &model,
            "--tokens",
            ids,
            "--prefill",
            "330",
            "-o",
            &npy,
            "--trace-selections",
            &selections,
            "--trace",
            &trace,
        ],
        &[
            "bench",
            "--overlap",
            "-m",
            "synthetic:tiny",
            "-d",
            "600",
            "-n",
            "4",
            "-r",
            "1",
            "--plot",
            &plot,
            "--trace",
            &trace,
        ],
        &["bench", "-m", "synthetic:tiny", "-d", "600", "-n", "4", "-r", "2", "-o", "json"],
        &["eval", "ppl", "-m", &model, "--tokens", ids, "-c", "100", "--output", &results, "--json"],
        &["man", "-o", &out("man")],
    ];
    let seed = std::env::var("SPECACHE_FUZZ_SEED").map_or(u64::from(std::process::id()), |seed| seed.parse().unwrap());
    println!("SPECACHE_FUZZ_SEED={seed}");
    let mut random = Random(seed);
    for args in commands {
        let start = Instant::now();
        assert!(command(args).output().unwrap().status.success(), "{args:?}");
        let whole = start.elapsed();
        let mut codes = [0, 0];
        for point in 0..8 {
            clear(&outputs);
            let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            std::thread::sleep(whole.mul_f64((random.bits() % 1100) as f64 / 1000.0));
            let pid = Pid::from_raw(child.id() as i32);
            let _ = kill(pid, Signal::SIGINT);
            if point % 4 == 3 {
                std::thread::sleep(Duration::from_millis(random.bits() % 10));
                let _ = kill(pid, Signal::SIGINT);
            }
            let mut printed = String::new();
            let code = end(&mut child);
            child.stdout.take().unwrap().read_to_string(&mut printed).unwrap();
            let what = format!("{args:?}, point {point}, {code:?}");
            match code {
                Some(0) => codes[0] += 1,
                // Before `main` runs, the signal ends the process as it does any other.
                Some(130) | None => codes[1] += 1,
                _ => panic!("{what}"),
            }
            if args.contains(&"json") || args.contains(&"--json") {
                assert!(printed.is_empty() || serde_json::from_str::<Value>(&printed).is_ok(), "{what}: {printed}");
                assert!(code != Some(0) || !printed.is_empty(), "{what}");
            }
            check(&outputs, &what);
        }
        println!("{}: {} whole, {} interrupted", args[..2].join(" "), codes[0], codes[1]);
    }
}

fn clear(folder: &Path) {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).unwrap();
}

/// A file of results may lack results, but has whole lines.
fn whole_lines(bytes: &[u8]) -> bool {
    let lines = bytes.split_inclusive(|&byte| byte == b'\n');
    lines.into_iter().all(|line| line.ends_with(b"\n") && serde_json::from_slice::<Value>(line).is_ok())
}

/// Every file is whole.
fn check(folder: &Path, what: &str) {
    for entry in fs::read_dir(folder).unwrap() {
        let file = entry.unwrap().path();
        if file.is_dir() {
            check(&file, what);
            continue;
        }
        let bytes = fs::read(&file).unwrap();
        let whole = match file.extension().and_then(OsStr::to_str) {
            Some("json") => serde_json::from_slice::<Value>(&bytes).is_ok(),
            Some("jsonl") => whole_lines(&bytes),
            Some("npy") => bytes.len() == 128 + 70 * 1536 * 4,
            Some("svg") => bytes.ends_with(b"</svg>\n"),
            Some("1") => bytes.starts_with(b".ie") && bytes.ends_with(b"\n"),
            _ => false,
        };
        assert!(whole, "{what}: {} of {} bytes", file.display(), bytes.len());
    }
}
