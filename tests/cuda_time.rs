//! Time on a GPU, on the emulated driver: traces, what a step waits for, and what `bench` and `devices` say of it.

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use common::emulated::{emulate, folder};
use serde_json::Value;

/// Runs the program with `folder`'s libraries: exit code, stdout, stderr.
fn run(folder: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_specache-engine"));
    let output = emulate(&mut command, folder).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A file of 200 token ids, and one beside it for a test to write.
fn files(test: &str) -> (String, String) {
    let file = |name: &str| Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{test}_{name}.json"));
    let (ids, out) = (file("ids"), file("out"));
    std::fs::write(&ids, format!("{:?}", (0..200).collect::<Vec<u32>>())).unwrap();
    (ids.display().to_string(), out.display().to_string())
}

fn generate<'a>(device: &'a str, ids: &'a str, rest: &[&'a str]) -> Vec<&'a str> {
    let fixed = ["generate", "-m", "synthetic:tiny", "-n", "4", "--temp", "0", "--ignore-eos", "--json"];
    fixed.into_iter().chain(["--device", device, "--tokens", ids]).chain(rest.iter().copied()).collect()
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Row, name, step and layer.
type Slice = (String, String, u64, Option<u64>);

/// What a trace has: row, name, step and layer of each slice, and how many wait.
fn slices(file: &str) -> BTreeSet<Slice> {
    let trace = parse(&std::fs::read_to_string(file).unwrap());
    let events = trace["traceEvents"].as_array().unwrap();
    let row = |event: &Value| {
        let name = |e: &&Value| e["name"] == "thread_name" && e["tid"] == event["tid"];
        events.iter().find(name).unwrap()["args"]["name"].as_str().unwrap().to_string()
    };
    let slices = events.iter().filter(|event| event["ph"] == "X");
    slices
        .map(|slice| {
            let (ts, us) = (slice["ts"].as_f64().unwrap(), slice["dur"].as_f64().unwrap());
            assert!(us >= 0.0 && ts >= 0.0 && ts + us < 600e6, "a time on the trace's clock: {slice}");
            let args = &slice["args"];
            let name = slice["name"].as_str().unwrap().to_string();
            (row(slice), name, args["step"].as_u64().unwrap(), args["layer"].as_u64())
        })
        .collect()
}

/// A GPU's rows have the CPU's names, steps and layers where both do the same.
#[test]
fn a_trace_names_what_ran_as_on_the_cpu() {
    let Some(folder) = folder() else { return };
    let (ids, out) = files("trace");
    let mut traces = ["cpu", "cuda"].map(|device| {
        let (code, text, err) = run(folder, &generate(device, &ids, &["--trace", &out]));
        assert_eq!(code, Some(0), "{err}");
        (parse(&text)["tokens"].clone(), slices(&out))
    });
    let [(cpu_tokens, cpu), (gpu_tokens, gpu)] = &mut traces;
    assert_eq!(cpu_tokens, gpu_tokens);
    // A GPU's copy-in queue gathers too; it counts hits in the selection, and appends in the projection.
    cpu.retain(|(row, name, ..)| !row.starts_with("gather") && !["hit rate", "append"].contains(&&name[..]));
    // It selects beside its layers, on a queue that has nothing else to do.
    let rows: BTreeSet<String> = gpu.iter().map(|s| s.0.clone()).collect();
    assert_eq!(rows.iter().map(String::as_str).collect::<Vec<_>>(), ["compute", "copy-in", "copy-out", "gather"]);
    let on_cpus_row = |(row, name, step, layer): Slice| match &name[..] {
        "select" => {
            assert_eq!(row, "gather");
            ("compute".to_string(), name, step, layer)
        }
        _ => (row, name, step, layer),
    };
    *gpu = std::mem::take(gpu).into_iter().map(on_cpus_row).collect();
    // A prefill's MLP is one operation there, and waits take as long as they take.
    let same = |(_, name, step, _): &Slice| *step > 1 && !name.starts_with("wait: ");
    let lost: Vec<_> = cpu.iter().filter(|s| same(s) && !gpu.contains(s)).collect();
    let new: Vec<_> = gpu.iter().filter(|s| same(s) && !cpu.contains(s)).collect();
    // A GPU launches a fetch before anybody knows whether there is something to fetch.
    assert!(lost.is_empty() && new.iter().all(|s| s.1 == "prefetch"), "{lost:#?} {new:#?}");
}

/// Nothing is timed that nobody asks for, and what is not measured is not 0.
#[test]
fn waits_are_measured_where_somebody_asks() {
    let Some(folder) = folder() else { return };
    let (ids, out) = files("waits");
    let exposed = |rest: &[&str]| {
        let (code, text, err) = run(folder, &generate("cuda", &ids, rest));
        assert_eq!(code, Some(0), "{err}");
        parse(&text)["specache"]["exposed_us_per_step"].clone()
    };
    assert_eq!(exposed(&[]), Value::Null);
    assert!(exposed(&["--trace", &out]).as_f64().unwrap() >= 0.0);
    // Here nothing is hidden: a step waits as long as its gathers take.
    assert!(exposed(&["--trace", &out, "--kv", "fetch"]).as_f64().unwrap() > 0.0);
}

#[test]
fn bench_names_the_gpu_and_what_it_reads() {
    let Some(folder) = folder() else { return };
    let bench = ["bench", "-m", "synthetic:tiny", "-d", "200", "-n", "2", "-r", "1", "--kv", "full,specache"];
    let run = |rest: &[&str]| run(folder, &[&bench[..], &["--device", "cuda"], rest].concat());
    // Too little memory to measure how fast it is read: in the emulation that takes long.
    let (code, text, err) = run(&["-o", "json", "--vram-budget", "100MiB"]);
    assert_eq!(code, Some(0), "{err}");
    let json = parse(&text);
    assert!(json["hardware"]["device"].as_str().unwrap().contains("Emulated GPU, sm_90, 4 SMs"), "{text}");
    assert_eq!((&json["hardware"]["gpu"], &json["hardware"]["read_gb_s"]), (&true.into(), &Value::Null));
    let modes = json["models"][0]["modes"].as_array().unwrap();
    // Two layers, two KV heads of 64: 512 bytes a layer and token.
    assert_eq!(modes[0]["kv_bytes_read_per_step"], 2 * 512 * 200);
    assert_eq!((&modes[0]["exposed_us_per_step"], modes[1]["exposed_us_per_step"].is_f64()), (&Value::Null, true));
    // The weights, 0.9 MB, are a part of the budget.
    let (code, _, err) = run(&["--vram-budget", "500KiB"]);
    assert!(code == Some(4) && err.contains("the weights") && err.contains("--vram-budget"), "{code:?} {err}");
}

#[test]
fn devices_says_what_the_driver_knows() {
    let Some(folder) = folder() else { return };
    let (code, text, err) = run(folder, &["devices"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(text.contains("cuda:0: Emulated GPU, sm_90, 4 SMs, 4.0 GiB, driver for CUDA 13.0"), "{text}");
}
