//! The C interface from the outside: header, libraries and examples in the layout that tools/install.sh makes. Needs a C
//! compiler; pkg-config, a C++ compiler, Python, NumPy and valgrind are used where they are, and a line says where one is not
//! (SPECACHE_REQUIRE_TOOLS=1: that is an error).

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{LazyLock, Mutex, PoisonError};

use specache::capi;

/// A function as C and Rust call it.
struct Function {
    name: &'static str,
    /// What it returns and takes, in C.
    c: (&'static str, &'static str),
    /// Its type in Rust, written out.
    rust: &'static str,
}

macro_rules! functions {
    ($($name:ident($($any:tt),*) $returns:literal $takes:literal;)*) => {
        [$(Function {
            name: stringify!($name),
            c: ($returns, $takes),
            rust: type_name(capi::$name as unsafe extern "C" fn($($any),*) -> _),
        },)*]
    };
}

fn type_name<T>(_: T) -> &'static str {
    std::any::type_name::<T>()
}

/// What the library exports, in the order of the header: nothing is ever taken away, renamed or changed while the ABI's major
/// version stays. New functions come with a new minor version.
#[rustfmt::skip]
fn functions() -> [Function; 40] {
    functions!(
        specache_abi_version() "uint32_t" "";
        specache_version() "const char *" "";
        specache_status_name(_) "const char *" "int32_t";
        specache_last_error() "const char *" "";
        specache_engine_options_init(_, _) "int32_t" "specache_engine_options *, uint32_t";
        specache_engine_create(_, _, _, _) "int32_t" "uint32_t, const char *, const specache_engine_options *, specache_engine **";
        specache_engine_free(_) "void" "specache_engine *";
        specache_engine_model_info(_, _) "int32_t" "specache_engine *, specache_model_info *";
        specache_engine_eos_tokens(_, _, _, _) "int32_t" "specache_engine *, uint32_t *, size_t, size_t *";
        specache_engine_describe(_, _, _, _) "int32_t" "specache_engine *, char *, size_t, size_t *";
        specache_engine_memory(_, _) "int32_t" "specache_engine *, specache_memory *";
        specache_engine_trace(_, _) "int32_t" "specache_engine *, int32_t";
        specache_engine_trace_write(_, _) "int32_t" "specache_engine *, const char *";
        specache_engine_measure_waits(_, _) "int32_t" "specache_engine *, int32_t";
        specache_tokenize(_, _, _, _, _, _, _) "int32_t" "specache_engine *, const char *, size_t, uint32_t, uint32_t *, size_t, size_t *";
        specache_detokenize(_, _, _, _, _, _) "int32_t" "specache_engine *, const uint32_t *, size_t, char *, size_t, size_t *";
        specache_chat_prompt(_, _, _, _, _, _, _) "int32_t" "specache_engine *, const specache_chat_message *, size_t, int32_t, char *, size_t, size_t *";
        specache_kv_options_init(_, _) "int32_t" "specache_kv_options *, uint32_t";
        specache_plan(_, _, _, _, _) "int32_t" "uint32_t, const char *, const specache_kv_options *, uint64_t, specache_memory_plan *";
        specache_session_create(_, _, _, _) "int32_t" "specache_engine *, const specache_kv_options *, uint64_t, specache_session **";
        specache_session_free(_) "void" "specache_session *";
        specache_session_fork(_, _) "int32_t" "specache_session *, specache_session **";
        specache_session_truncate(_, _) "int32_t" "specache_session *, uint64_t";
        specache_session_reset(_) "int32_t" "specache_session *";
        specache_session_reserve(_, _) "int32_t" "specache_session *, uint64_t";
        specache_session_cancel(_) "int32_t" "specache_session *";
        specache_session_clear_cancel(_) "int32_t" "specache_session *";
        specache_session_prefill(_, _, _) "int32_t" "specache_session *, const uint32_t *, size_t";
        specache_session_prefill_text(_, _, _, _) "int32_t" "specache_session *, const char *, size_t, uint32_t";
        specache_session_prefill_chat(_, _, _, _) "int32_t" "specache_session *, const specache_chat_message *, size_t, uint64_t *";
        specache_sampling_options_init(_, _, _) "int32_t" "specache_engine *, specache_sampling_options *, uint32_t";
        specache_session_set_sampling(_, _) "int32_t" "specache_session *, const specache_sampling_options *";
        specache_session_generate(_, _, _, _, _, _, _) "int32_t" "specache_session *, uint64_t, uint32_t, specache_token_fn, void *, uint64_t *, int32_t *";
        specache_session_step(_, _, _, _) "int32_t" "specache_session *, uint32_t, float *, size_t";
        specache_session_logits(_, _, _, _) "int32_t" "specache_session *, float *, size_t, size_t *";
        specache_session_sample(_, _) "int32_t" "specache_session *, uint32_t *";
        specache_step_batch(_, _, _) "int32_t" "specache_step *, size_t, size_t";
        specache_session_tokens(_, _, _, _) "int32_t" "specache_session *, uint32_t *, size_t, size_t *";
        specache_session_get_stats(_, _) "int32_t" "specache_session *, specache_session_stats *";
        specache_session_layer_stats(_, _, _, _) "int32_t" "specache_session *, specache_layer_stats *, size_t, size_t *";
    )
}

/// A type of C as Rust names it.
fn rust_type(c: &str) -> String {
    let pointee = |c: &str| rust_type(c.trim_end());
    if let Some(c) = c.strip_suffix('*') {
        return match c.strip_prefix("const ") {
            Some(c) => format!("*const {}", pointee(c)),
            None => format!("*mut {}", pointee(c)),
        };
    }
    let name = match c {
        "int32_t" => "i32",
        "uint32_t" => "u32",
        "uint64_t" => "u64",
        "size_t" => "usize",
        "float" => "f32",
        "char" => "i8",
        "void" => "core::ffi::c_void",
        "specache_engine" => std::any::type_name::<capi::EngineHandle>(),
        "specache_session" => std::any::type_name::<capi::SessionHandle>(),
        "specache_engine_options" => std::any::type_name::<capi::EngineOptions>(),
        "specache_kv_options" => std::any::type_name::<capi::KvOptionsC>(),
        "specache_sampling_options" => std::any::type_name::<capi::SamplingOptionsC>(),
        "specache_model_info" => std::any::type_name::<capi::ModelInfo>(),
        "specache_memory" => std::any::type_name::<capi::Memory>(),
        "specache_memory_plan" => std::any::type_name::<capi::MemoryPlan>(),
        "specache_session_stats" => std::any::type_name::<capi::SessionStats>(),
        "specache_layer_stats" => std::any::type_name::<capi::LayerStats>(),
        "specache_chat_message" => std::any::type_name::<capi::ChatMessage>(),
        "specache_step" => std::any::type_name::<capi::Step>(),
        "specache_token_fn" => std::any::type_name::<Option<capi::TokenFn>>(),
        other => panic!("{other} is new"),
    };
    name.into()
}

/// The header's numbers. None of them ever changes.
const CONSTANTS: [(&str, i64); 43] = [
    ("SPECACHE_OK", 0),
    ("SPECACHE_ERR_FAILED", 1),
    ("SPECACHE_ERR_USAGE", 2),
    ("SPECACHE_ERR_MODEL", 3),
    ("SPECACHE_ERR_OUT_OF_MEMORY", 4),
    ("SPECACHE_ERR_DEVICE", 5),
    ("SPECACHE_ERR_CANCELLED", 6),
    ("SPECACHE_ERR_BUSY", 7),
    ("SPECACHE_ERR_HANDLE", 8),
    ("SPECACHE_ERR_ABI", 9),
    ("SPECACHE_ERR_BUFFER", 10),
    ("SPECACHE_ERR_INTERNAL", 11),
    ("SPECACHE_LOG_ERROR", 1),
    ("SPECACHE_LOG_WARN", 2),
    ("SPECACHE_LOG_INFO", 3),
    ("SPECACHE_LOG_DEBUG", 4),
    ("SPECACHE_LINEAR_AUTO", 0),
    ("SPECACHE_LINEAR_FUSED", 1),
    ("SPECACHE_LINEAR_CUBLAS", 2),
    ("SPECACHE_GATHER_DEFAULT", 0),
    ("SPECACHE_GATHER_GPU", 1),
    ("SPECACHE_GATHER_CPU", 2),
    ("SPECACHE_GATHER_AUTO", 3),
    ("SPECACHE_ADD_SPECIAL", 1),
    ("SPECACHE_KV_FULL", 0),
    ("SPECACHE_KV_KIVI", 1),
    ("SPECACHE_KV_OFFLOAD", 2),
    ("SPECACHE_KV_FETCH", 3),
    ("SPECACHE_KV_SPECACHE", 4),
    ("SPECACHE_DTYPE_AUTO", 0),
    ("SPECACHE_DTYPE_BF16", 1),
    ("SPECACHE_DTYPE_FP16", 2),
    ("SPECACHE_DTYPE_FP32", 3),
    ("SPECACHE_NO_TOKEN", 0xFFFF_FFFF),
    ("SPECACHE_IGNORE_EOS", 1),
    ("SPECACHE_NO_TEXT", 2),
    ("SPECACHE_STOP_ERROR", -1),
    ("SPECACHE_STOP_LENGTH", 0),
    ("SPECACHE_STOP_EOS", 1),
    ("SPECACHE_STOP_FULL", 2),
    ("SPECACHE_ABI_MAJOR", 0),
    ("SPECACHE_ABI_MINOR", 1),
    ("SPECACHE_ABI_VERSION", capi::SPECACHE_ABI_VERSION as i64),
];

/// A struct as C and Rust call it, its size, and its fields with their places.
struct Layout {
    name: &'static str,
    size: usize,
    rust_size: usize,
    fields: Vec<(&'static str, usize)>,
}

macro_rules! layouts {
    ($($name:literal $rust:ident $size:literal: $($field:ident)*;)*) => {
        [$(Layout {
            name: $name,
            size: $size,
            rust_size: size_of::<capi::$rust>(),
            fields: vec![$((stringify!($field), std::mem::offset_of!(capi::$rust, $field)),)*],
        },)*]
    };
}

/// Sizes are of x86-64. They may grow with a new minor version, but for the last three.
fn layouts() -> [Layout; 11] {
    layouts!(
        "specache_engine_options" EngineOptions 72: struct_size threads device device_budget host_kv_budget lock_memory
            trace log log_user_data log_level linear gather gather_threads;
        "specache_kv_options" KvOptionsC 28: struct_size mode bits group_size residual_len top_k dtype;
        "specache_sampling_options" SamplingOptionsC 32: struct_size temperature top_k top_p min_p repeat_penalty seed;
        "specache_model_info" ModelInfo 56: struct_size vocab_size n_layers n_heads n_kv_heads head_dim hidden_size
            has_tokenizer has_chat_template n_eos max_positions weight_bytes;
        "specache_memory" Memory 104: struct_size reserved device_bytes device_budget device_weight_bytes device_kv_bytes
            device_workspace_bytes weight_bytes host_mapped_bytes host_kv_budget host_page_bytes host_pages_leased host_pages_reserved host_pages_free;
        "specache_memory_plan" MemoryPlan 72: struct_size reserved packed_bytes wide_bytes slot_bytes load_bytes
            device_bytes prefill_bytes host_bytes weight_bytes;
        "specache_token" TokenC 40: struct_size id index text n_bytes is_eos reserved;
        "specache_session_stats" SessionStats 144: struct_size n_layers n_tokens max_tokens steps hit_rate acceptance
            accepted compared fetched_bytes pre_decode_bytes offloaded_bytes exposed_ns packed_bytes wide_bytes slot_bytes
            load_bytes host_bytes exposed_steps;
        "specache_chat_message" ChatMessage 16: role content;
        "specache_layer_stats" LayerStats 32: hits hits_of fetched selected;
        "specache_step" Step 40: session logits n_logits token next status reserved;
    )
}

const FLAGS: [&str; 4] = ["-Wall", "-Wextra", "-Werror", "-pedantic"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi").join(name)
}

/// What the command printed; it must succeed.
#[track_caller]
fn run(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(status.success(), "{command:?}: {status}\n{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

/// Whether a tool is there; says so if not.
fn has(tool: &str) -> bool {
    let there = Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success());
    if !there {
        assert!(std::env::var_os("SPECACHE_REQUIRE_TOOLS").is_none(), "{tool} is not there");
        eprintln!("{tool} is not there: what needs it was not tested");
    }
    there
}

/// The folder that the library was installed into.
static PREFIX: LazyLock<PathBuf> = LazyLock::new(|| {
    let (prefix, built) = (scratch("prefix"), std::env::current_exe().unwrap());
    let _ = std::fs::remove_dir_all(&prefix);
    let built = built.parent().unwrap();
    run(Command::new("sh").arg(root().join("tools/install.sh")).arg(&prefix).arg("--from").arg(built));
    prefix
});

fn lib() -> PathBuf {
    PREFIX.join("lib")
}

/// Flags as a user gets them: from pkg-config, or by hand where there is none.
fn flags(options: &[&str]) -> Vec<String> {
    if !has("pkg-config") {
        return vec![
            format!("-I{}", PREFIX.join("include").display()),
            format!("-L{}", lib().display()),
            "-lspecache".into(),
        ];
    }
    let pkg_config = lib().join("pkgconfig");
    let text = run(Command::new("pkg-config").env("PKG_CONFIG_PATH", pkg_config).args(options).arg("specache"));
    text.split_whitespace().map(str::to_string).collect()
}

/// Compiles an example with the flags of the installed library.
fn example(name: &str) -> PathBuf {
    compile(&root().join("examples/c").join(name).with_extension("c"))
}

/// Once for all tests: one may run a program while another one asks for it.
fn compile(source: &Path) -> PathBuf {
    static COMPILED: Mutex<BTreeMap<PathBuf, PathBuf>> = Mutex::new(BTreeMap::new());
    let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(program) = compiled.get(source) {
        return program.clone();
    }
    let program = scratch(source.file_stem().unwrap().to_str().unwrap());
    std::fs::create_dir_all(program.parent().unwrap()).unwrap();
    let mut cc = Command::new("cc");
    run(cc
        .arg("-std=c99")
        .args(FLAGS)
        .arg(source)
        .args(flags(&["--cflags", "--libs"]))
        .args(["-lpthread", "-o"])
        .arg(&program));
    compiled.insert(source.to_path_buf(), program.clone());
    program
}

fn start(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    // As on a machine without a GPU.
    command.env("LD_LIBRARY_PATH", lib()).env("SPECACHE_LIBCUDA", common::NO_DRIVER);
    command
}

fn model() -> PathBuf {
    common::fixture("recall")
}

fn prompt() -> String {
    std::fs::read_to_string(common::fixture("recall_prompt.txt")).unwrap()
}

/// What the command line says to the same.
fn cli(prompt: &str, n: &str) -> String {
    let mut cli = common::command(&[]);
    run(cli.args(["generate", "-n", n, "-p", prompt, "-m"]).arg(model()))
}

#[test]
fn streams_a_completion() {
    let complete = example("complete");
    let (prompt, expected) = (prompt(), cli(&prompt(), "12"));
    assert_eq!(run(start(&complete).arg(model()).arg(&prompt).arg("12")), expected);
    // Errors are words and an exit code.
    let output = start(&complete).args(["/no/such/folder", "a"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && text.contains("no such folder"), "{text}");
}

#[test]
fn two_sessions_in_one_batch() {
    let prompts =
        ["The password of kose zesi rere bago. Recall kose", "The password of fimi maga losu rere. Recall fimi"];
    let expected = prompts.map(|prompt| format!("{prompt}{}\n", cli(prompt, "8"))).concat();
    assert_eq!(run(start(example("batch")).arg(model()).args(prompts).arg("8")), expected);
}

#[test]
fn own_log_and_cancel() {
    let text = run(start(example("cancel")).arg(model()).arg(prompt()).arg("5"));
    for words in [
        "plan: 927744 bytes on the device",
        "log 3: recall: 4 layers",
        "log 4: a session",
        "ended: cancelled",
        "went on: 4",
    ] {
        assert!(text.contains(words), "no {words:?} in {text}");
    }
}

/// Calls in the destructors of a thread's own data, when the library's are gone.
#[test]
fn calls_at_a_threads_end() {
    let program = compile(&root().join("tests/capi_thread_end.c"));
    assert_eq!(run(start(program).arg(model())), "4 rounds\n");
}

/// Without a shared library: what programs that are shipped in one file do.
#[test]
fn linked_statically() {
    let program = scratch("complete-static");
    std::fs::create_dir_all(program.parent().unwrap()).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-std=c99", "-I"]).arg(PREFIX.join("include")).arg(root().join("examples/c/complete.c"));
    cc.arg(lib().join("libspecache.a"));
    let own = |flag: &String| !flag.starts_with("-L") && flag != "-lspecache";
    let private = flags(&["--static", "--libs"]).into_iter().filter(own);
    run(cc.args(private).args(["-lgcc_s", "-lpthread", "-lm", "-ldl", "-o"]).arg(&program));
    assert_eq!(run(Command::new(program).arg(model()).arg(prompt()).arg("4")), cli(&prompt(), "4"));
}

/// Python with our module: that of a virtual environment that has NumPy, where CI made one.
fn python() -> Command {
    let own = root().join("target/python/bin/python3");
    let mut python = start(if own.exists() { own } else { "python3".into() });
    python.env("SPECACHE_LIBRARY", lib().join("libspecache.so.0")).env("PYTHONDONTWRITEBYTECODE", "1");
    python.env("PYTHONPATH", root().join("examples/python"));
    python
}

/// A program of Python that begins with an engine and a prefilled session of much room, `s`.
fn script(body: &str) -> Command {
    let mut python = python();
    let begin = "import sys, threading, time, specache\n\
                 e = specache.Engine(sys.argv[1])\n\
                 s = e.session(100_000, kv='kivi')\n\
                 s.prefill([1, 2, 3])\n";
    python.arg("-c").arg(format!("{begin}{body}")).arg(model());
    python
}

/// A program may end while a generation runs, on whatever thread.
#[test]
fn python_ends_in_the_middle() {
    if !has("python3") {
        return;
    }
    let pieces = "it = s.generate(50_000, ignore_eos=True)\nnext(it)\nprint('ends')";
    let daemon = "go = threading.Event()\n\
                  work = lambda: s.generate_ids(50_000, True, lambda piece: go.set())\n\
                  threading.Thread(target=work, daemon=True).start()\n\
                  go.wait()\n\
                  print('ends')";
    let cycle = "s.it = s.generate(50_000, ignore_eos=True)\nnext(s.it)\nprint('ends')";
    let closed = "it = s.generate(50_000, ignore_eos=True)\nnext(it)\ns.close()\ne.close()\nprint('ends')";
    for body in [pieces, daemon, cycle, closed] {
        for _ in 0..3 {
            let Output { status, stdout, stderr } = script(body).output().unwrap();
            let stderr = String::from_utf8_lossy(&stderr);
            assert!(status.success() && stdout == b"ends\n" && stderr.is_empty(), "{status}: {stderr}");
        }
    }
}

/// Ctrl-C ends a call that takes long, as an exception, and the session goes on.
#[test]
fn python_is_interrupted() {
    use nix::sys::signal::{Signal, kill};
    use std::io::{BufRead, BufReader};
    if !has("python3") {
        return;
    }
    // Python leaves Ctrl-C alone where it was told to ignore it, as what a shell starts in the background is.
    let body = "import signal\n\
                signal.signal(signal.SIGINT, signal.default_int_handler)\n\
                for call in (lambda: s.generate_ids(50_000, True), lambda: s.prefill([5] * 60_000)):\n    \
                print('runs', flush=True)\n    \
                try:\n        call()\n    \
                except KeyboardInterrupt:\n        print('stopped', flush=True)\n\
                print(len(s.generate_ids(3, True)), flush=True)";
    let mut child = script(body).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(|line| line.unwrap());
    for _ in 0..2 {
        assert_eq!(lines.next().unwrap(), "runs");
        std::thread::sleep(std::time::Duration::from_millis(300));
        kill(nix::unistd::Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
        let line = lines.next().unwrap();
        if line != "stopped" {
            let _ = child.kill(); // it would generate for long
        }
        assert_eq!(line, "stopped");
    }
    assert_eq!(lines.next().unwrap(), "3");
    assert!(child.wait().unwrap().success());
}

#[test]
fn from_python() {
    if !has("python3") {
        return;
    }
    let complete = root().join("examples/python/complete.py");
    let text = run(python().arg(complete).arg(model()).arg(prompt()).arg("12"));
    assert_eq!(text.strip_suffix('\n'), Some(cli(&prompt(), "12").as_str()));
    let checks = root().join("tests/capi.py");
    assert_eq!(
        run(python().arg(checks).arg(model()).arg(common::fixture("recall_prompt.txt")).arg(scratch("python.json"))),
        "ok\n"
    );
}

/// Whatever a C program of ours does, it reads and writes no byte that is not its own, and loses none.
#[test]
fn under_valgrind() {
    if !has("valgrind") {
        return;
    }
    let batch = example("batch");
    let mut valgrind = start("valgrind");
    // It knows no AVX-512. Rust's thread pools end after the program, so what they hold is not lost, only not freed.
    valgrind.env("SPECACHE_ISA", "avx2").args(["-q", "--error-exitcode=9", "--leak-check=full"]);
    valgrind.args(["--show-leak-kinds=definite", "--errors-for-leak-kinds=definite"]).arg(batch).arg(model());
    run(valgrind.args(["The password of kose zesi. Recall kose", "Recall fimi", "2"]));
}

/// The header stands alone, in C99 and C++11, without a warning; and C sees the structs that Rust sees.
#[test]
fn header() {
    let dir = scratch("header");
    std::fs::create_dir_all(&dir).unwrap();
    let mut source = "#include <specache.h>\n#include <stdio.h>\nint main(void) {\n".to_string();
    let mut expected = String::new();
    for Layout { name, size, rust_size, fields } in layouts() {
        assert_eq!(size, rust_size, "{name}");
        source += &format!("printf(\"{name} %zu\\n\", sizeof({name}));\n");
        expected += &format!("{name} {size}\n");
        for (field, at) in fields {
            source += &format!("printf(\"{field} %zu\\n\", offsetof({name}, {field}));\n");
            expected += &format!("{field} {at}\n");
        }
    }
    for (name, value) in CONSTANTS {
        source += &format!("printf(\"{name} %lld\\n\", (long long){name});\n");
        expected += &format!("{name} {value}\n");
    }
    source += "return 0;\n}\n";
    let file = dir.join("sizes.c");
    std::fs::write(&file, source).unwrap();
    let include = format!("-I{}", PREFIX.join("include").display());
    let program = dir.join("sizes");
    run(Command::new("cc").arg("-std=c99").args(FLAGS).arg(&include).arg(&file).arg("-o").arg(&program));
    assert_eq!(run(&mut Command::new(program)), expected);
    if has("g++") {
        let mut cxx = Command::new("g++");
        run(cxx.args(["-x", "c++", "-std=c++11"]).args(FLAGS).arg(&include).args(["-c", "-o", "/dev/null"]).arg(&file));
    }
}

/// A declaration of the header: name, and what it returns and takes.
fn declaration(text: &str) -> (&str, String, String) {
    let (head, takes) = text.split_once('(').unwrap();
    let at = head.find("specache_").unwrap();
    // Without the names of parameters.
    let kind = |parameter: &str| {
        let name = parameter.rfind(|c: char| !c.is_alphanumeric() && c != '_').map_or(0, |at| at + 1);
        parameter[..name].trim().to_string()
    };
    let takes = takes.strip_suffix(')').unwrap();
    let takes =
        if takes == "void" { vec![] } else { takes.split(',').map(|parameter| kind(parameter.trim())).collect() };
    (&head[at..], head[..at].trim().to_string(), takes.join(", "))
}

/// Exactly the functions of the header, under the name that programs remember, and of the same types in C and Rust.
#[test]
fn symbols() {
    let header = std::fs::read_to_string(PREFIX.join("include/specache.h")).unwrap();
    // All code, on one line for each statement.
    let code = header.split("/*").flat_map(|part| part.split_once("*/").map_or(part, |(_, code)| code).lines());
    let code = code.filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join(" ");
    let statements = code.split([';', '{']).map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "));
    let starts = ["int32_t specache_", "uint32_t specache_", "void specache_", "const char *specache_"];
    let declared: Vec<String> = statements.filter(|text| starts.iter().any(|start| text.starts_with(start))).collect();
    let functions = functions();
    assert_eq!(declared.len(), functions.len());
    for (text, Function { name, c: (returns, takes), rust }) in declared.iter().zip(&functions) {
        assert_eq!(declaration(text), (*name, returns.to_string(), takes.to_string()));
        let types: Vec<String> = takes.split(", ").filter(|c| !c.is_empty()).map(rust_type).collect();
        let result = if *returns == "void" { String::new() } else { format!(" -> {}", rust_type(returns)) };
        assert_eq!(*rust, format!("unsafe extern \"C\" fn({}){result}", types.join(", ")), "{name}");
    }
    // Whatever has a number is among those that are pinned.
    let numbers = header.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| {
        word.starts_with("SPECACHE_") && !word.ends_with('_') && *word != "SPECACHE_H" && *word != "SPECACHE_LIBRARY"
    });
    for word in numbers {
        assert!(CONSTANTS.iter().any(|(name, _)| *name == word), "{word}");
    }

    let library = lib().join("libspecache.so");
    let symbols = run(Command::new("nm").args(["-D", "--defined-only"]).arg(&library));
    let mut exported: Vec<&str> = symbols.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
    let mut functions = functions.map(|function| function.name);
    exported.sort_unstable();
    functions.sort_unstable();
    assert_eq!(exported, functions);

    let dynamic = run(Command::new("readelf").arg("-d").arg(&library));
    assert!(dynamic.contains("soname: [libspecache.so.0]"), "{dynamic}");
    let version = capi::SPECACHE_ABI_VERSION;
    assert_eq!(version >> 16, 0, "the SONAME in build.rs has the ABI's major version");
}
