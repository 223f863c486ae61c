//! Libraries of the CUDA toolkit, opened before cudarc is asked for them: what it does not find, it panics over.
#![allow(unsafe_code)] // Opening libraries.

use std::ffi::OsStr;
use std::path::PathBuf;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};

/// Opens library `name` ("nvrtc", "cublasLt") for good, under a name that cudarc tries too. Looks where the system looks,
/// then where toolkits and Python packages put it: opened from there once, it answers to its short name from then on.
///
/// # Errors
/// Where it was looked for.
pub(super) fn open(name: &str) -> Result<(), String> {
    let short = cudarc::get_lib_name_candidates(name);
    if short.iter().any(keep) {
        return Ok(());
    }
    let folders = folders();
    for folder in &folders {
        for version in [".13", ".12", ""] {
            let file = folder.join(format!("lib{name}.so{version}"));
            if file.is_file() && keep(&file) && short.iter().any(keep) {
                return Ok(());
            }
        }
    }
    let folders: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
    Err(format!("lib{name}.so is not where the system looks, nor in {}", folders.join(", ")))
}

/// Opens a library and never closes it.
fn keep(name: impl AsRef<OsStr>) -> bool {
    // SAFETY: the constructors of NVIDIA's libraries may be run on any thread at any time.
    unsafe { Library::open(Some(name.as_ref()), RTLD_LAZY | RTLD_GLOBAL) }.map(std::mem::forget).is_ok()
}

/// Folders in which toolkits and Python packages keep their libraries.
fn folders() -> Vec<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(set).chain([PathBuf::from("/usr/local/cuda")]);
    let mut folders: Vec<PathBuf> = toolkits.map(|toolkit| toolkit.join("lib64")).collect();
    let environment = set("VIRTUAL_ENV").or_else(|| set("CONDA_PREFIX"));
    let roots = environment.into_iter().chain(["/usr/local".into(), "/usr".into()]);
    for root in roots {
        let versions = std::fs::read_dir(root.join("lib")).into_iter().flatten().flatten();
        for python in versions.filter(|entry| entry.file_name().to_string_lossy().starts_with("python3")) {
            for packages in ["site-packages", "dist-packages"] {
                let nvidia = std::fs::read_dir(python.path().join(packages).join("nvidia"));
                folders.extend(nvidia.into_iter().flatten().flatten().map(|package| package.path().join("lib")));
            }
        }
    }
    folders
}
