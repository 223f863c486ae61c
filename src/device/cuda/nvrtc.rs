//! Kernels compiled on the machine that runs them, for a program that was built without nvcc: NVRTC turns the embedded
//! sources into machine code once, and the disk keeps it.
#![allow(unsafe_code)] // Calls into NVRTC.

use std::ffi::{CString, c_char};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::ptr;

use cudarc::nvrtc::sys;
use rayon::prelude::*;

use super::driver::Facts;
use super::images::{HEADERS, KERNELS, Source};
use super::library;
use crate::error::{Error, Result};
use crate::notice;

/// A kernel file, compiled.
pub(crate) struct Compiled {
    /// Machine code for one architecture.
    pub image: Vec<u8>,
    source: &'static Source,
    /// Where it was read from; `None` if it has just been compiled.
    read_from: Option<PathBuf>,
}

impl Compiled {
    /// Compiles it anew if it came from the disk, where it may have been damaged.
    ///
    /// # Errors
    /// As [`compile_all`].
    pub(crate) fn recompile(&self, facts: &Facts) -> Result<Option<Vec<u8>>> {
        let Some(file) = &self.read_from else { return Ok(None) };
        notice::info(format_args!("{} does not load: compiling it anew", file.display()));
        // If it stays, the next start does the same.
        let _ = fs::remove_file(file);
        Ok(Some(compile(self.source, facts, &Nvrtc::open()?)?.image))
    }
}

/// All kernels for a GPU: from the disk where they are, else compiled and kept there.
///
/// # Errors
/// [`Error::Device`] if there is no NVRTC, naming what to install, or if it refuses a source.
pub(crate) fn compile_all(facts: &Facts) -> Result<Vec<Compiled>> {
    let nvrtc = Nvrtc::open()?;
    let kept: Vec<_> = KERNELS.iter().map(|source| nvrtc.read(source, facts)).collect();
    let missing = kept.iter().filter(|kept| kept.is_none()).count();
    if missing > 0 {
        notice::info(format_args!("compiling {missing} kernel files for {}, once for this machine", facts.gpu.name));
    }
    let compiled = KERNELS.par_iter().zip(kept).map(|(source, kept)| match kept {
        Some(kept) => Ok(kept),
        None => compile(source, facts, &nvrtc),
    });
    compiled.collect()
}

/// NVRTC, found and opened.
struct Nvrtc {
    /// Major and minor.
    version: (i32, i32),
}

impl Nvrtc {
    fn open() -> Result<Nvrtc> {
        library::open("nvrtc").map_err(|why| {
            Error::Device(format!(
                "this program was built without nvcc, and NVRTC, which would compile its kernels, cannot be opened \
                 ({why}): install the CUDA toolkit or `pip install nvidia-cuda-nvrtc`, or set CUDA_HOME"
            ))
        })?;
        let mut version = (0, 0);
        // SAFETY: the library is there, as was just seen; writes two ints.
        check("nvrtcVersion", unsafe { sys::nvrtcVersion(&mut version.0, &mut version.1) })?;
        Ok(Nvrtc { version })
    }

    /// The kept file of a kernel: its name says all that its contents depend on.
    fn file(&self, source: &Source, facts: &Facts) -> Option<PathBuf> {
        let mut hash = Fnv::default();
        for text in HEADERS.iter().chain([source]) {
            hash.add(text.name.as_bytes());
            hash.add(text.text.as_bytes());
        }
        options(facts).iter().for_each(|option| hash.add(option.as_bytes()));
        hash.add(format!("{:?} {}", self.version, facts.gpu.driver).as_bytes());
        let stem = Path::new(source.name).file_stem()?.to_str()?;
        Some(folder()?.join(format!("{stem}-{}-{:016x}.cubin", architecture(facts), hash.0)))
    }

    fn read(&self, source: &'static Source, facts: &Facts) -> Option<Compiled> {
        let file = self.file(source, facts)?;
        let kept = fs::read(&file).ok()?;
        let (image, sum) = kept.split_at_checked(kept.len().checked_sub(8)?)?;
        if sum != checksum(image) {
            // Half written by a machine that lost its power, say: not worth a word.
            return None;
        }
        Some(Compiled { image: image.to_vec(), source, read_from: Some(file) })
    }

    /// Keeps an image. Without a place for it the next start compiles again, which is slow and not wrong.
    fn keep(&self, source: &Source, facts: &Facts, image: &[u8]) {
        let Some(file) = self.file(source, facts) else { return };
        let unfinished = file.with_extension(format!("{}.partial", std::process::id()));
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(file.parent().expect("a file in a folder"))?;
            let mut to = fs::File::create(&unfinished)?;
            to.write_all(image)?;
            to.write_all(&checksum(image))?;
            to.sync_all()?;
            fs::rename(&unfinished, &file)
        };
        if let Err(e) = write() {
            notice::info(format_args!(
                "compiled kernels cannot be kept as {}: {e}; the next start compiles again",
                file.display()
            ));
            let _ = fs::remove_file(&unfinished);
        }
    }
}

/// Where compiled kernels are kept: `$XDG_CACHE_HOME/specache`, else `~/.cache/specache`.
pub(super) fn folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    cache.or_else(|| set("HOME").map(|home| home.join(".cache"))).map(|cache| cache.join("specache"))
}

fn architecture(facts: &Facts) -> String {
    let (major, minor) = facts.gpu.arch;
    // Hopper's own instructions need its own target.
    let suffix = if major == 9 { "a" } else { "" };
    format!("sm_{major}{minor}{suffix}")
}

fn options(facts: &Facts) -> [String; 2] {
    [format!("--gpu-architecture={}", architecture(facts)), "--std=c++17".into()]
}

fn compile(source: &'static Source, facts: &Facts, nvrtc: &Nvrtc) -> Result<Compiled> {
    let c = |text: &str| CString::new(text).expect("sources and options have no zero bytes");
    let (text, name) = (c(source.text), c(source.name));
    let headers: Vec<[CString; 2]> = HEADERS.iter().map(|h| [c(h.text), c(h.name)]).collect();
    let pointers = |which: usize| headers.iter().map(|h| h[which].as_ptr()).collect::<Vec<*const c_char>>();
    let mut program = Program(ptr::null_mut());
    // SAFETY: all strings end with zeros and outlive the call; writes one handle.
    let created = unsafe {
        let (texts, names) = (pointers(0), pointers(1));
        let n = headers.len() as i32;
        sys::nvrtcCreateProgram(&mut program.0, text.as_ptr(), name.as_ptr(), n, texts.as_ptr(), names.as_ptr())
    };
    check("nvrtcCreateProgram", created)?;
    let options = options(facts).map(|option| c(&option));
    let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
    // SAFETY: the program was created; the options outlive the call.
    let result = unsafe { sys::nvrtcCompileProgram(program.0, options.len() as i32, options.as_ptr()) };
    if let Err(e) = check("nvrtcCompileProgram", result) {
        return Err(Error::Device(format!("{}: {e}\n{}", source.name, program.log())));
    }
    let image = program.image()?;
    nvrtc.keep(source, facts, &image);
    Ok(Compiled { image, source, read_from: None })
}

struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        let mut len = 0;
        // SAFETY: writes a size.
        let known = unsafe { sys::nvrtcGetProgramLogSize(self.0, &mut len) };
        let mut log = vec![0u8; len];
        let read = check("nvrtcGetProgramLogSize", known).and_then(|()| {
            // SAFETY: writes as many bytes as were just asked for, a zero at the end.
            check("nvrtcGetProgramLog", unsafe { sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast()) })
        });
        match read {
            Ok(()) => String::from_utf8_lossy(&log).trim_end_matches('\0').to_string(),
            Err(e) => e.to_string(),
        }
    }

    fn image(&self) -> Result<Vec<u8>> {
        let mut len = 0;
        // SAFETY: writes a size.
        check("nvrtcGetCUBINSize", unsafe { sys::nvrtcGetCUBINSize(self.0, &mut len) })?;
        let mut image = vec![0u8; len];
        // SAFETY: writes as many bytes as were just asked for.
        check("nvrtcGetCUBIN", unsafe { sys::nvrtcGetCUBIN(self.0, image.as_mut_ptr().cast()) })?;
        Ok(image)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once; null before it was created, which NVRTC refuses.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn check(call: &str, result: sys::nvrtcResult) -> Result<()> {
    match result {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok(()),
        failed => Err(Error::Device(format!("{call}: {failed:?}"))),
    }
}

/// The 64-bit FNV-1a hash, with lengths, so that text cannot move between its parts.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Fnv {
        Fnv(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes.iter().copied().chain((bytes.len() as u64).to_le_bytes()) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

fn checksum(image: &[u8]) -> [u8; 8] {
    let mut hash = Fnv::default();
    hash.add(image);
    hash.0.to_le_bytes()
}
