//! The probe for GPUs, against drivers that are not there, stubs, old ones, broken ones and one that works: small libraries made
//! for the test.

use std::path::{Path, PathBuf};
use std::process::Command;

use specache::device::cuda::probe::{Gpu, NoGpu, probe};

/// A driver of three GPUs; `-D` breaks it.
const DRIVER: &str = r#"
#include <stddef.h>
#include <string.h>
#ifndef INIT
#define INIT 0
#endif
#ifndef VERSION
#define VERSION 13000
#endif
#ifndef COUNT
#define COUNT 2
#endif
int cuInit(unsigned flags) { return flags == 0 ? INIT : 1; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
#ifndef STUB
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
#endif
int cuDeviceGet(int *device, int i) { *device = i + 40; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Test GPU", length); return device < 40; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)(device - 39) << 33; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? (device == 40 ? 9 : 7) : attribute == 76 ? (device == 40 ? 0 : 5)
           : attribute == 16 ? 132 : -1;
    return 0;
}
"#;

/// Builds a driver with these definitions.
fn driver(name: &str, definitions: &[&str]) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (source, library) = (dir.join(format!("{name}.c")), dir.join(format!("lib{name}.so")));
    std::fs::write(&source, DRIVER).unwrap();
    let mut gcc = Command::new("gcc");
    gcc.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).args(definitions);
    assert!(gcc.status().unwrap().success());
    library
}

#[test]
fn every_way_of_having_no_gpu_is_named() {
    let cases: [(&str, &[&str], NoGpu, &str); 5] = [
        ("old", &["-DVERSION=11080"], NoGpu::TooOld(11_080), "supports CUDA 11.8: 12.0 or newer"),
        ("none", &["-DCOUNT=0"], NoGpu::NoDevice, "CUDA_VISIBLE_DEVICES"),
        ("hidden", &["-DINIT=100"], NoGpu::NoDevice, "finds no GPU"),
        ("torn", &["-DINIT=803"], NoGpu::Failed { call: "cuInit", code: 803 }, "reboot after a driver update"),
        ("odd", &["-DINIT=12345"], NoGpu::Failed { call: "cuInit", code: 12_345 }, "error 12345"),
    ];
    for (name, definitions, expected, words) in cases {
        let error = probe(Some(&driver(name, definitions))).unwrap_err();
        assert_eq!(error, expected);
        assert!(error.to_string().contains(words), "{error}");
    }
    let stub = driver("stub", &["-DSTUB"]);
    let error = probe(Some(&stub)).unwrap_err().to_string();
    assert!(error.contains("has no cuDeviceGetCount") && error.contains("install the NVIDIA driver"), "{error}");
    let missing = probe(Some(Path::new("no-such-driver.so"))).unwrap_err();
    assert!(matches!(&missing, NoGpu::NoDriver(why) if why.contains("no-such-driver.so")), "{missing}");
}

#[test]
fn gpus_are_described() {
    let gpus = probe(Some(&driver("good", &[]))).unwrap();
    let expected = [
        Gpu { index: 0, name: "Test GPU".into(), arch: (9, 0), n_sms: 132, memory: 8 << 30, driver: 13_000 },
        Gpu { index: 1, name: "Test GPU".into(), arch: (7, 5), n_sms: 132, memory: 16 << 30, driver: 13_000 },
    ];
    assert_eq!(gpus, expected);
    assert_eq!(gpus[0].to_string(), "cuda:0: Test GPU, sm_90, 132 SMs, 8.0 GiB, driver for CUDA 13.0");
    assert!(gpus[1].to_string().ends_with("16.0 GiB, driver for CUDA 13.0 (too old: sm_80 or newer is needed)"));
}

/// The binary lists what there is and says in one line why it computes on the CPU; asking for a GPU is an error.
#[test]
fn the_command_line_says_what_there_is() {
    let run = |library: &Path, args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_specache-engine"));
        let output = command.env("SPECACHE_LIBCUDA", library).args(args).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let good = driver("good_cli", &[]);
    let (code, out, _) = run(&good, &["--list-devices"]);
    assert!(code == Some(0) && out.contains("cpu: ") && out.contains("cuda:0: Test GPU, sm_90"), "{out}");
    let (code, out, _) = run(Path::new("nowhere.so"), &["--list-devices"]);
    assert!(code == Some(0) && out.contains("no CUDA device: no NVIDIA driver"), "{out}");
    let ids = Path::new(env!("CARGO_TARGET_TMPDIR")).join("probe_ids.json");
    std::fs::write(&ids, "[1]").unwrap();
    let ids = ids.display().to_string();
    let generate = ["generate", "-m", "synthetic:tiny", "--tokens", &ids, "-n", "1", "--device"];
    for (library, device, expected, words) in [
        (&good, "cuda", 5, "undefined symbol"),
        (&good, "cuda", 5, "install a newer NVIDIA driver"),
        (&good, "cuda:5", 2, "there are 2 GPUs, cuda:0 to cuda:1"),
        (&PathBuf::from("nowhere.so"), "cuda:0", 5, "no NVIDIA driver"),
        (&good, "gpu", 2, "auto, cpu, cuda or cuda:N"),
    ] {
        let (code, _, err) = run(library, &[&generate[..], &[device]].concat());
        assert!(code == Some(expected) && err.contains(words), "{device}: {err}");
    }
}
