//! What the integration tests share: fixtures, NPY files, distances between logits.
#![allow(dead_code)] // Each test binary uses its own part.

pub mod capi;
pub mod emulated;
pub mod tiny;

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use specache::cpu::Isa;
use specache::device::{Device, DeviceChoice, DeviceOptions};
use specache::kv::{KvMode, KvOptions};
use specache::teacher::{Forced, forced};
use specache::{Engine, Session};

/// Where no driver is: with it in `SPECACHE_LIBCUDA` a program runs as on a machine without a GPU.
pub const NO_DRIVER: &str = "/nowhere/libcuda.so";

/// The program without the environment's own settings, as on a machine without a GPU.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_specache-engine"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SPECACHE_")) {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null()).env("SPECACHE_LIBCUDA", NO_DRIVER);
    command
}

/// The two ends of a pseudo-terminal: a test's and a program's.
#[allow(unsafe_code)] // nix has it, but a feature for one call would be built for all.
pub fn terminal() -> (File, OwnedFd) {
    let (mut ours, mut its) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: two places for two descriptors; the other arguments are optional.
    let opened = unsafe { libc::openpty(&mut ours, &mut its, none, none.cast(), none.cast()) };
    assert_eq!(opened, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: both were just opened, for nobody else.
    unsafe { (File::from_raw_fd(ours), OwnedFd::from_raw_fd(its)) }
}

/// Gives a pseudo-terminal so many columns.
#[allow(unsafe_code)] // As above.
pub fn set_columns(terminal: &File, columns: u16) {
    let size = libc::winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request reads a `winsize`.
    let set = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn json<T: serde::de::DeserializeOwned>(path: impl AsRef<Path>) -> T {
    let path = path.as_ref();
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A NPY file of little-endian float32 `[rows, cols]`, version 1.
pub fn npy(path: impl AsRef<Path>) -> Vec<Vec<f32>> {
    let path = path.as_ref();
    let file = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(&file[..8], b"\x93NUMPY\x01\x00", "{}", path.display());
    let header_len = u16::from_le_bytes([file[8], file[9]]) as usize;
    let header = std::str::from_utf8(&file[10..10 + header_len]).unwrap();
    assert!(header.contains("'<f4'") && header.contains("'fortran_order': False"), "{header}");
    let shape = header.split_once("'shape': (").unwrap().1.split_once(')').unwrap().0;
    let dims: Vec<usize> = shape.split(',').filter_map(|d| d.trim().parse().ok()).collect();
    let numbers: Vec<f32> =
        file[10 + header_len..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(numbers.len(), dims.iter().product::<usize>());
    numbers.chunks_exact(dims[1]).map(<[f32]>::to_vec).collect()
}

/// The CPU, whatever this machine has. Buffers are poisoned, so that whatever nobody wrote reads as NaN.
pub fn options(threads: usize) -> DeviceOptions {
    DeviceOptions { choice: DeviceChoice::Cpu, threads: Some(threads), poison: true, ..Default::default() }
}

pub fn device(threads: usize) -> Device {
    Device::cpu(&options(threads)).unwrap()
}

pub fn engine(spec: &str) -> Engine {
    Engine::load(spec, &options(2)).unwrap()
}

/// Runs the tests of this binary whose name contains `filter` again, on every other instruction set of this machine.
pub fn on_every_other_isa(filter: &str) {
    let best = Isa::from_env().unwrap();
    for isa in Isa::available().into_iter().filter(|&isa| isa != best) {
        let mut tests = Command::new(std::env::current_exe().unwrap());
        let output = tests.arg(filter).env("SPECACHE_ISA", isa.to_string()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{isa}: {text}");
        assert!(!text.contains("running 0 tests"), "{filter}: {text}");
    }
}

/// The recall model in a Hugging Face cache, as `hf download` leaves it: blobs, snapshots of links to them, and a name for the newest.
pub fn hub_cache(hub: &Path, model: &str, revisions: &[&str], main: Option<&str>) {
    let folder = hub.join(format!("models--{}", model.replace('/', "--")));
    let blobs = folder.join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    for revision in revisions {
        let snapshot = folder.join("snapshots").join(revision);
        fs::create_dir_all(&snapshot).unwrap();
        for entry in fs::read_dir(fixture("recall")).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name();
            fs::copy(entry.path(), blobs.join(&name)).unwrap();
            symlink(Path::new("../../blobs").join(&name), snapshot.join(&name)).unwrap();
        }
    }
    if let Some(revision) = main {
        fs::create_dir_all(folder.join("refs")).unwrap();
        fs::write(folder.join("refs/main"), revision).unwrap();
    }
}

pub fn recall() -> Engine {
    engine(fixture("recall").to_str().unwrap())
}

pub fn kv(mode: KvMode, bits: usize, group_size: usize, residual_len: usize, top_k: usize) -> KvOptions {
    KvOptions { mode, bits, group_size, residual_len, top_k, dtype: None }
}

/// All rows of a teacher-forced run, with the session for its trace and figures.
pub fn run(
    engine: &Engine,
    kv: KvOptions,
    ids: &[u32],
    prefill: usize,
    speculative: Option<&[u32]>,
) -> (Vec<Vec<f32>>, Session) {
    let mut rows = Vec::new();
    let session = forced(engine, kv, Forced { ids, prefill, speculative, trace: true }, |row| {
        rows.push(row.to_vec());
        Ok(())
    })
    .unwrap();
    (rows, session)
}

pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, |m, d| if d.is_nan() { f32::NAN } else { m.max(d) })
}

/// How far two runs are apart.
#[derive(Debug)]
pub struct Distance {
    pub max: f32,
    /// Of the rows' maxima.
    pub median: f32,
    pub first_row: f32,
    pub mean_kld: f64,
}

impl Distance {
    pub fn between(ours: &[Vec<f32>], theirs: &[Vec<f32>]) -> Distance {
        assert_eq!(ours.len(), theirs.len());
        let mut rows: Vec<f32> = ours.iter().zip(theirs).map(|(a, b)| max_difference(a, b)).collect();
        let first_row = rows[0];
        let kld = |(a, b): (&Vec<f32>, &Vec<f32>)| specache::reference::kl_divergence(b, a);
        let mean_kld = ours.iter().zip(theirs).map(kld).sum::<f64>() / rows.len() as f64;
        assert!(rows.iter().all(|r| r.is_finite()), "NaN at row {:?}", rows.iter().position(|r| !r.is_finite()));
        rows.sort_by(f32::total_cmp);
        Distance { max: rows[rows.len() - 1], median: rows[rows.len() / 2], first_row, mean_kld }
    }
}
