//! Ranges for profilers, as a profiler's library hears them: one made for the test, which writes what it is told to a file.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Does what a profiler does: asks for the tables of NVTX 3, and fills in what it listens to. The thread is in front of each
/// line. `-DREFUSES`, `-DDEAF=1`: one that does not want to, or listens to nothing.
const PROFILER: &str = r#"
#define _GNU_SOURCE
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#ifndef DEAF
#define DEAF 0
#endif
typedef void (*Function)(void);
typedef struct { size_t bytes; int (*table)(unsigned module, Function ***table, unsigned *size); } Callbacks;
typedef struct { size_t bytes; unsigned version, reserved; void (*set_version)(unsigned); } Version;
static FILE *out;
static int push(const char *name) { fprintf(out, "%d push %s\n", gettid(), name); fflush(out); return 0; }
static int pop(void) { fprintf(out, "%d pop\n", gettid()); fflush(out); return 0; }
int InitializeInjectionNvtx2(const void *(*export_table)(unsigned)) {
#ifdef REFUSES
    return 0;
#endif
    static const unsigned sizes[] = {0, 16, 9, 15, 7, 16, 7};
    const Callbacks *callbacks = export_table(1);
    const Version *version = export_table(3);
    out = fopen(getenv("RANGES"), "w");
    if (!out || callbacks->bytes < sizeof *callbacks || version->version != 3 || export_table(2)) return 0;
    version->set_version(3);
    for (unsigned module = 1; module < 7; module++) {
        Function **table = NULL;
        unsigned size = 0;
        if (!callbacks->table(module, &table, &size) || size != sizes[module] || table[0] || table[size]) return 0;
        for (unsigned i = 1; i < size; i++) if (!table[i]) return 0;
        if (module == 1 && !DEAF) *table[9] = (Function)push, *table[11] = (Function)pop;
    }
    Function **none;
    unsigned size;
    return !callbacks->table(0, &none, &size) && !callbacks->table(7, &none, &size);
}
"#;

fn profiler(name: &str, definitions: &[&str]) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (source, library) = (dir.join(format!("{name}.c")), dir.join(format!("lib{name}.so")));
    std::fs::write(&source, PROFILER).unwrap();
    let mut gcc = Command::new("gcc");
    gcc.args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"]).arg(&library).arg(&source).args(definitions);
    assert!(gcc.status().unwrap().success());
    library
}

/// Decodes three tokens behind a prompt of 200. Returns what it printed on stdout and stderr, and the ranges.
fn run(library: &Path) -> (String, String, String) {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let name = library.file_stem().map_or("none".into(), |stem| stem.to_string_lossy());
    let (ids, ranges) = (dir.join(format!("{name}.json")), dir.join(format!("{name}.ranges")));
    std::fs::write(&ids, format!("{:?}", (0..200).collect::<Vec<u32>>())).unwrap();
    let _ = std::fs::remove_file(&ranges);
    let mut command = Command::new(env!("CARGO_BIN_EXE_specache-engine"));
    command.env("NVTX_INJECTION64_PATH", library).env("RANGES", &ranges);
    command
        .args(["generate", "-m", "synthetic:tiny", "-n", "3", "--temp", "0", "--device", "cpu", "--tokens"])
        .arg(&ids);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr), std::fs::read_to_string(&ranges).unwrap_or_default())
}

#[test]
fn steps_layers_operations_and_prefetches_are_ranges_that_nest() {
    let (_, stderr, ranges) = run(&profiler("nvtx_profiler", &[]));
    assert!(!stderr.contains("NVTX"), "{stderr}");
    let mut open: std::collections::HashMap<&str, Vec<&str>> = Default::default();
    let mut paths = std::collections::BTreeSet::new();
    for line in ranges.lines() {
        let (thread, what) = line.split_once(' ').unwrap();
        let stack = open.entry(thread).or_default();
        match what.strip_prefix("push ") {
            Some(name) => {
                stack.push(name);
                paths.insert(stack.join("/"));
            }
            None => assert!(stack.pop().is_some(), "a range ends that did not begin"),
        }
    }
    assert!(open.values().all(Vec::is_empty), "every range ends on its thread");
    // The prefill is step 1, the pre-decode step 2. Gathers and prefetches have threads of their own.
    for path in [
        "step 1/embed",
        "step 1/layer 1/attend",
        "step 2/layer 0/select",
        "step 3/layer 0/norm_qkv_rope",
        "step 3/layer 1/down_residual",
        "step 4/norm_logits",
        "gather",
        "prefetch",
        "page out",
    ] {
        assert!(paths.contains(path), "no range {path} in {paths:#?}");
    }
}

#[test]
fn a_profiler_that_cannot_be_used_is_a_warning_and_nothing_else() {
    let without = run(Path::new("")).0;
    for (library, why) in [
        (profiler("nvtx_refuses", &["-DREFUSES"]), "it refused"),
        (profiler("nvtx_deaf", &["-DDEAF=1"]), "it does not listen to ranges"),
        (PathBuf::from("/nowhere/libprofiler.so"), "cannot open shared object file"),
    ] {
        let (stdout, stderr, ranges) = run(&library);
        assert!(stderr.contains("NVTX_INJECTION64_PATH") && stderr.contains(why), "{stderr}");
        assert_eq!((stdout, ranges), (without.clone(), String::new()));
    }
}
