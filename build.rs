//! Names the shared library for the linker. Compiles the launch plans of the CUDA kernels (plain C; any C compiler), and
//! the kernels themselves where there is an nvcc. Tells which commit was built, where there is one: `specache-engine
//! --version`, `specache_version` and bench reports name it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Files of csrc/ that are programs for the GPU.
const KERNELS: [&str; 11] =
    ["attn_decode", "attn_prefill", "dense", "draw", "embed", "fetch", "linear", "pack", "read", "sample", "select"];

/// What one image serves, where SPECACHE_CUDA_ARCHS ("90a", "86,90a") does not name less: Ampere (A100; A10, 3090, A6000), Ada, Hopper, Blackwell (data centre; consumer), and what comes
/// later by way of PTX.
const ARCHITECTURES: [&str; 7] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_86,code=sm_86",
    "arch=compute_89,code=sm_89",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100,code=sm_100",
    "arch=compute_120,code=sm_120",
    "arch=compute_80,code=compute_80",
];

fn main() {
    // Without these, cargo would run the script again for any change in the tree.
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=csrc");
    shared_library();
    commit();
    plans();
    let images = nvcc().map(|nvcc| images(&nvcc));
    let text = match images {
        Some(images) => format!("pub(crate) const BUILT: Option<&[(&str, &[u8])]> = Some(&[{images}]);"),
        None => "pub(crate) const BUILT: Option<&[(&str, &[u8])]> = None;".to_string(),
    };
    fs::write(out_dir().join("images.rs"), text).expect("OUT_DIR can be written");
}

fn out_dir() -> PathBuf {
    PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"))
}

fn shared_library() {
    // The name that programs remember: it changes when the ABI's major version does (include/specache.h).
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libspecache.so.0");
    // Worker threads may still be ending when a program unloads the library.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}

fn commit() {
    let Some(git_dir) = git(&["rev-parse", "--absolute-git-dir"]) else { return };
    for name in ["HEAD", "logs/HEAD"] {
        let file = Path::new(&git_dir).join(name);
        if file.exists() {
            println!("cargo:rerun-if-changed={}", file.display());
        }
    }
    if let Some(commit) = git(&["rev-parse", "--short=10", "HEAD"]) {
        println!("cargo:rustc-env=SPECACHE_COMMIT={commit}");
    }
}

/// One line of git's answer, or nothing where there is no git or no repository.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok()?;
    let line = String::from_utf8(output.stdout).ok()?.trim().to_string();
    (output.status.success() && !line.is_empty()).then_some(line)
}

/// What says how each kernel is launched.
fn plans() {
    let mut files: Vec<_> =
        fs::read_dir("csrc/plan").expect("csrc/plan").map(|entry| entry.expect("csrc/plan").path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "c"));
    files.sort();
    cc::Build::new().files(files).std("c99").warnings(true).extra_warnings(true).compile("specache_plans");
}

/// `SPECACHE_NVCC`, else the one on the PATH, else that of CUDA_HOME. `SPECACHE_NVCC=none`: none, NVRTC will do.
fn nvcc() -> Option<PathBuf> {
    for name in ["SPECACHE_NVCC", "CUDA_HOME", "PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if let Some(nvcc) = env::var_os("SPECACHE_NVCC").filter(|v| !v.is_empty()) {
        return (nvcc != "none").then(|| nvcc.into());
    }
    let homes = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).chain(homes).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
}

fn architectures() -> Vec<String> {
    println!("cargo:rerun-if-env-changed=SPECACHE_CUDA_ARCHS");
    let asked = env::var("SPECACHE_CUDA_ARCHS").unwrap_or_default();
    let asked: Vec<_> = asked.split(',').map(str::trim).filter(|arch| !arch.is_empty()).collect();
    match asked[..] {
        [] => ARCHITECTURES.map(String::from).to_vec(),
        _ => asked.iter().map(|arch| format!("arch=compute_{arch},code=sm_{arch}")).collect(),
    }
}

/// One image a kernel file. Returns them as Rust: `("name", include_bytes!(...)), ...`.
fn images(nvcc: &Path) -> String {
    let mut list = String::new();
    for name in KERNELS {
        let image = out_dir().join(format!("{name}.fatbin"));
        let mut command = Command::new(nvcc);
        command.args(["-fatbin", "-std=c++17", "-O3", "--threads", "0", "-o"]).arg(&image);
        for architecture in architectures() {
            command.args(["-gencode", &architecture]);
        }
        let status = command.arg(format!("csrc/{name}.cu")).status();
        assert!(
            status.as_ref().is_ok_and(|status| status.success()),
            "{} could not compile csrc/{name}.cu ({status:?}): CUDA 12.8 or newer is needed; SPECACHE_NVCC=none builds \
             without it",
            nvcc.display()
        );
        list.push_str(&format!("({name:?}, include_bytes!({:?})), ", image.display().to_string()));
    }
    list
}
