//! Tests on the emulated CUDA driver (csrc/README.md): a GPU's driver API, and the real kernels, on the CPU.
//!
//! Each test runs in a process of its own: the driver reads its environment once, and after a fault it stays broken.

use std::ffi::{CString, c_char, c_int, c_uint};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use libloading::Library;
use specache::device::order::Checker;
use specache::device::{Device, DeviceChoice, DeviceOptions, GatherWay};

/// Names the test that a child process runs.
const CHILD: &str = "SPECACHE_TEST_ON_GPU";
/// What a child says at its end.
const DONE: &str = "done on the emulated GPU";

/// Runs `body` in a process of its own with an emulated GPU and this environment, and holds the driver's report against it:
/// no race, no fault, nothing left behind. `test`: the name of the test that calls this.
pub fn on_gpu(test: &str, environment: &[(&str, &str)], body: impl FnOnce()) {
    if std::env::var(CHILD).as_deref() == Ok(test) {
        body();
        report(environment.iter().any(|(name, _)| *name == "SPECACHE_EMU_FAIL"));
        println!("{DONE}");
        // What the test does next is for processes of their own again.
        std::process::exit(0);
    }
    let Some(folder) = folder() else { return };
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(CHILD, test);
    let output = emulate(&mut child, folder).envs(environment.iter().copied()).output().unwrap();
    let text = text(&output);
    assert!(output.status.success() && text.contains(DONE), "{test}, {environment:?}: {text}");
    if std::env::var_os("SPECACHE_TEST_VERBOSE").is_some() {
        println!("{text}");
    }
}

/// Everything that a process has said.
pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Gives a process the emulated driver in `folder`, and a place for its kernels.
pub fn emulate<'a>(command: &'a mut Command, folder: &Path) -> &'a mut Command {
    let mut paths = vec![folder.to_path_buf()];
    paths.extend(std::env::split_paths(&std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default()));
    command.env("LD_LIBRARY_PATH", std::env::join_paths(paths).unwrap()).env_remove("SPECACHE_LIBCUDA");
    command.env("XDG_CACHE_HOME", Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels"))
}

/// Where the emulated driver is. `None`, with a line that says so: it is not there and cannot be built.
pub fn folder() -> Option<&'static Path> {
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match FOLDER.get_or_init(built) {
        Ok(folder) => Some(folder),
        Err(why) if std::env::var_os("SPECACHE_REQUIRE_EMULATION").is_none() => {
            println!("skipped: {why}");
            None
        }
        Err(why) => panic!("{why}"),
    }
}

/// The driver of today's sources: built anew if it is older than they are and this machine has what that takes.
fn built() -> Result<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = root.join("target/emulated/libspecache_emu.so");
    let age = |file: &Path| fs::metadata(file).and_then(|m| m.modified()).ok();
    if age(&library).is_some_and(|built| built >= youngest(&root.join("csrc"))) {
        return Ok(library.parent().unwrap().into());
    }
    let is = if library.is_file() { "older than csrc/" } else { "not built" };
    let gcc = Command::new("g++").arg("--version").output().is_ok();
    if !gcc || !root.join("target/cuda/.complete").is_file() {
        return Err(format!("the emulated CUDA driver is {is}: tools/emulated_driver.sh builds it"));
    }
    let output = Command::new("bash").arg("tools/emulated_driver.sh").current_dir(root).output().unwrap();
    assert!(output.status.success(), "tools/emulated_driver.sh: {}", text(&output));
    Ok(library.parent().unwrap().into())
}

/// When the youngest file of a folder was written, except tests: they are no part of the driver.
fn youngest(folder: &Path) -> SystemTime {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let ages = entries.filter(|e| e.file_name() != "tests" && e.file_name() != "README.md").map(|entry| {
        if entry.file_type().unwrap().is_dir() {
            youngest(&entry.path())
        } else {
            entry.metadata().unwrap().modified().unwrap()
        }
    });
    ages.max().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// What the driver of this process has found.
///
/// # Panics
/// If that is an error, or a context or memory that outlives its engine. `faulty`: a fault was ordered; it may show.
#[allow(unsafe_code)]
fn report(faulty: bool) {
    let mut text = vec![0u8; 1 << 16];
    // SAFETY: the library is open already; all functions have these types (csrc/emu/driver, cuda.h).
    let (errors, released) = unsafe {
        let library = Library::new("libcuda.so.1").unwrap();
        let report = library.get::<unsafe extern "C" fn(*mut c_char, usize) -> c_int>("specache_emu_report").unwrap();
        let state =
            library.get::<unsafe extern "C" fn(c_int, *mut c_uint, *mut c_int) -> c_int>("cuDevicePrimaryCtxGetState");
        let (state, begin) = (state.unwrap(), Instant::now());
        // A thread that prepares pages may hold the driver a moment longer than its engine lives.
        let is_active = || {
            let (mut flags, mut active) = (0, 0);
            state(0, &mut flags, &mut active) == 0 && active != 0
        };
        while !faulty && begin.elapsed() < Duration::from_secs(20) && is_active() {
            std::thread::yield_now();
        }
        let release = library.get::<unsafe extern "C" fn(c_int) -> c_int>("cuDevicePrimaryCtxRelease_v2").unwrap();
        let released = release(0);
        (report(text.as_mut_ptr().cast(), text.len()), released)
    };
    text.truncate(text.iter().position(|&byte| byte == 0).unwrap());
    let text = CString::new(text).unwrap().into_string().unwrap();
    println!("{text}");
    assert!(errors == 0, "{text}");
    const NO_CONTEXT: c_int = 201;
    assert!(released == NO_CONTEXT || faulty, "the context is still there: {released}");
    assert!(!text.contains("are left at the context's end") || faulty, "{text}");
}

/// An emulated GPU whose order of operations is checked.
pub struct Gpu {
    pub device: Device,
    order: Arc<Mutex<Checker>>,
}

/// Has a child's GPU be one whose pairs the host gathers: an entry of the environment for [`on_gpu`].
pub const HOST_GATHERS: (&str, &str) = ("SPECACHE_TEST_HOST_GATHERS", "1");

/// The options of [`gpu`].
pub fn gpu_options() -> DeviceOptions {
    let gather = std::env::var_os(HOST_GATHERS.0).map(|_| GatherWay::Cpu);
    DeviceOptions { choice: DeviceChoice::Cuda(0), threads: Some(1), poison: true, gather, ..Default::default() }
}

/// An emulated GPU, poisoned.
pub fn gpu(options: DeviceOptions) -> Gpu {
    let order = Arc::<Mutex<Checker>>::default();
    let device = Device::open(&DeviceOptions { order: Some(order.clone()), ..options }).unwrap();
    Gpu { device, order }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let checker = self.order.lock().unwrap();
            assert!(checker.operations() > 0 && checker.conflicts().is_empty(), "{:?}", checker.conflicts());
        }
    }
}
