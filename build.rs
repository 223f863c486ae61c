//! Names the shared library for the linker, and tells which commit was built, where there is one: `specache-engine
//! --version`, `specache_version` and bench reports name it.

use std::path::Path;
use std::process::Command;

fn main() {
    // Without this, cargo would run the script again for any change in the tree.
    println!("cargo:rerun-if-changed=build.rs");
    // The name that programs remember: it changes when the ABI's major version does (include/specache.h).
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libspecache.so.0");
    // Worker threads may still be ending when a program unloads the library.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
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
