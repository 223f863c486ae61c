//! The C interface from the outside: header, libraries and examples in the layout that tools/install.sh makes. Needs a C
//! compiler; pkg-config, a C++ compiler, Python and valgrind are used where they are, and a line says where one is not.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use specache::capi;

/// What the library exports, in the order of the header: nothing is ever taken away or renamed while the ABI's major version
/// stays. New functions come with a new minor version.
const FUNCTIONS: [&str; 38] = [
    "specache_abi_version",
    "specache_version",
    "specache_status_name",
    "specache_last_error",
    "specache_engine_options_init",
    "specache_engine_create",
    "specache_engine_free",
    "specache_engine_model_info",
    "specache_engine_eos_tokens",
    "specache_engine_describe",
    "specache_engine_memory",
    "specache_engine_trace",
    "specache_engine_trace_write",
    "specache_tokenize",
    "specache_detokenize",
    "specache_chat_prompt",
    "specache_kv_options_init",
    "specache_plan",
    "specache_session_create",
    "specache_session_free",
    "specache_session_fork",
    "specache_session_truncate",
    "specache_session_reset",
    "specache_session_reserve",
    "specache_session_cancel",
    "specache_session_clear_cancel",
    "specache_session_prefill",
    "specache_session_prefill_text",
    "specache_sampling_options_init",
    "specache_session_set_sampling",
    "specache_session_generate",
    "specache_session_step",
    "specache_session_logits",
    "specache_session_sample",
    "specache_step_batch",
    "specache_session_tokens",
    "specache_session_get_stats",
    "specache_session_layer_stats",
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
        "specache_engine_options" EngineOptions 64: struct_size threads device device_kv_budget host_kv_budget lock_memory
            trace log log_user_data log_level reserved;
        "specache_kv_options" KvOptionsC 28: struct_size mode bits group_size residual_len top_k dtype;
        "specache_sampling_options" SamplingOptionsC 32: struct_size temperature top_k top_p min_p repeat_penalty seed;
        "specache_model_info" ModelInfo 56: struct_size vocab_size n_layers n_heads n_kv_heads head_dim hidden_size
            has_tokenizer has_chat_template n_eos max_positions weight_bytes;
        "specache_memory" Memory 80: struct_size reserved weight_bytes device_kv_bytes device_kv_budget host_mapped_bytes
            host_kv_budget host_page_bytes host_pages_leased host_pages_reserved host_pages_free;
        "specache_memory_plan" MemoryPlan 72: struct_size reserved packed_bytes wide_bytes slot_bytes load_bytes
            device_bytes prefill_bytes host_bytes weight_bytes;
        "specache_token" TokenC 40: struct_size id index text n_bytes is_eos reserved;
        "specache_session_stats" SessionStats 136: struct_size n_layers n_tokens max_tokens steps hit_rate acceptance
            accepted compared fetched_bytes pre_decode_bytes offloaded_bytes exposed_ns packed_bytes wide_bytes slot_bytes
            load_bytes host_bytes;
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
    let program = scratch(name);
    std::fs::create_dir_all(program.parent().unwrap()).unwrap();
    let source = root().join("examples/c").join(name).with_extension("c");
    let mut cc = Command::new("cc");
    run(cc
        .arg("-std=c99")
        .args(FLAGS)
        .arg(source)
        .args(flags(&["--cflags", "--libs"]))
        .args(["-lpthread", "-o"])
        .arg(&program));
    program
}

fn start(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", lib());
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
    let mut cli = Command::new(env!("CARGO_BIN_EXE_specache-engine"));
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
    let text = run(start(example("cancel")).arg(model()).arg(prompt()).arg("50"));
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

#[test]
fn from_python() {
    if !has("python3") {
        return;
    }
    let python = || {
        let mut python = start("python3");
        python.env("SPECACHE_LIBRARY", lib().join("libspecache.so.0")).env("PYTHONDONTWRITEBYTECODE", "1");
        python.env("PYTHONPATH", root().join("examples/python"));
        python
    };
    let complete = root().join("examples/python/complete.py");
    let text = run(python().arg(complete).arg(model()).arg(prompt()).arg("12"));
    assert_eq!(text.strip_suffix('\n'), Some(cli(&prompt(), "12").as_str()));
    let checks = root().join("tests/capi.py");
    assert_eq!(run(python().arg(checks).arg(model()).arg(common::fixture("recall_prompt.txt"))), "ok\n");
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
    expected += &format!("{}\n", capi::SPECACHE_ABI_VERSION);
    source += "printf(\"%u\\n\", (unsigned)SPECACHE_ABI_VERSION);\nreturn 0;\n}\n";
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

/// Exactly the functions of the header, under the name that programs remember.
#[test]
fn symbols() {
    let header = std::fs::read_to_string(PREFIX.join("include/specache.h")).unwrap();
    let starts = ["int32_t specache_", "uint32_t specache_", "void specache_", "const char *specache_"];
    let declared = header.lines().filter(|line| starts.iter().any(|start| line.starts_with(start)));
    let name = |line: &str| line[line.find("specache_").unwrap()..line.find('(').unwrap()].to_string();
    assert_eq!(declared.map(name).collect::<Vec<_>>(), FUNCTIONS);

    let library = lib().join("libspecache.so");
    let symbols = run(Command::new("nm").args(["-D", "--defined-only"]).arg(&library));
    let mut exported: Vec<&str> = symbols.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
    let mut functions = FUNCTIONS.to_vec();
    exported.sort_unstable();
    functions.sort_unstable();
    assert_eq!(exported, functions);

    let dynamic = run(Command::new("readelf").arg("-d").arg(&library));
    assert!(dynamic.contains("soname: [libspecache.so.0]"), "{dynamic}");
    let version = capi::SPECACHE_ABI_VERSION;
    assert_eq!(version >> 16, 0, "the SONAME in build.rs has the ABI's major version");
}
