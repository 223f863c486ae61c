//! `doctor`: what of this machine matters to the engine, and what to change.

use std::fmt;
use std::fs::{self, read_to_string};
use std::path::{Path, PathBuf};

use specache::cpu::Isa;
use specache::device::choice::gpus;
use specache::device::cuda::probe::{Gpu, NoGpu};
use specache::device::cuda::toolkit::{self, Toolkit};
use specache::device::{pin, ram};
use specache::error::Result;
use specache::gather::Topology;

use super::output::print;
use super::size;

/// Runs the command.
///
/// # Errors
/// What keeps the engine from running at all; a closed stdout.
pub fn run() -> Result<()> {
    let root = Path::new("/");
    let isa = Isa::from_env();
    let mut findings = vec![instruction_set(&isa)];
    findings.extend(processors(&Topology::detect()));
    findings.extend(graphics());
    findings.push(memory(ram::available()));
    findings.push(group_memory(root));
    findings.push(locking(pin::memlock_limit(), pin::locked_bytes()));
    findings.extend(huge_pages(root));
    print(&findings.iter().map(|finding| format!("{finding}\n")).collect::<String>())?;
    isa.map(drop)
}

/// How good it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing to do.
    Ok,
    /// Something would be better otherwise.
    Note,
    /// Something does not work.
    Problem,
}

/// One line of the report.
struct Finding {
    state: State,
    what: String,
    /// What to change, and how.
    fix: Option<String>,
}

impl Finding {
    fn ok(what: impl Into<String>) -> Finding {
        Finding { state: State::Ok, what: what.into(), fix: None }
    }

    fn note(what: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding { state: State::Note, what: what.into(), fix: Some(fix.into()) }
    }

    fn problem(what: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding { state: State::Problem, ..Finding::note(what, fix) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let state = match self.state {
            State::Ok => "ok",
            State::Note => "note",
            State::Problem => "problem",
        };
        write!(f, "{state:<8} {}", self.what)?;
        self.fix.iter().try_for_each(|fix| write!(f, "\n{:9}-> {fix}", ""))
    }
}

fn instruction_set(isa: &Result<Isa>) -> Finding {
    match isa {
        Err(why) => Finding::problem(format!("instruction set: {why}"), "unset SPECACHE_ISA"),
        Ok(Isa::Portable) if Isa::detect() == Isa::Portable => Finding::note(
            "instruction set: portable only; the CPU device is several times slower than with AVX2",
            "use a machine or virtual CPU type with AVX2, FMA and F16C",
        ),
        Ok(isa) if *isa < Isa::detect() => Finding::note(
            format!("instruction set: {isa}, though this machine has {}", Isa::detect()),
            "unset SPECACHE_ISA for the widest",
        ),
        Ok(isa) => Finding::ok(format!("instruction set: {isa}")),
    }
}

fn processors(topology: &Topology) -> Vec<Finding> {
    let cpus: usize = topology.nodes().iter().map(|node| node.cpus.len()).sum();
    let quota = match topology.quota() {
        Some(quota) if quota < cpus as f64 => Finding::note(
            format!("CPU quota: the control group grants {quota:.1} of {cpus} CPUs"),
            "raise cpu.max of the group (containers: --cpus), or give -t that many threads",
        ),
        _ => Finding::ok(format!("CPU quota: none below the {cpus} CPUs that this process may use")),
    };
    vec![Finding::ok(format!("NUMA: {}", topology.describe())), quota]
}

fn graphics() -> Vec<Finding> {
    let (gpus, toolkit) = (gpus(), toolkit::find());
    let has_gpu = gpus.as_ref().is_ok_and(|gpus| gpus.iter().any(Gpu::is_supported));
    let mut findings = match &gpus {
        Ok(gpus) => gpus.iter().map(gpu).collect(),
        Err(why) => vec![no_gpu(why)],
    };
    findings.extend(kernels(&toolkit, has_gpu));
    findings
}

fn gpu(gpu: &Gpu) -> Finding {
    match gpu.is_supported() {
        true => Finding::ok(gpu.to_string()),
        false => Finding::note(gpu.to_string(), "use a GPU of the Ampere generation or newer, or --device cpu"),
    }
}

fn no_gpu(why: &NoGpu) -> Finding {
    let what = format!("GPU: {why}; the CPU computes");
    match why {
        NoGpu::NoDriver(_) => {
            Finding::note(what, "for a GPU install the NVIDIA driver 525 or newer (containers: --gpus all)")
        }
        NoGpu::NoDevice => Finding::note(what, "check CUDA_VISIBLE_DEVICES and, in a container, --gpus"),
        NoGpu::Stub { .. } => {
            Finding::problem(what, "install the NVIDIA driver; leave the toolkit's stubs out of LD_LIBRARY_PATH")
        }
        NoGpu::TooOld(_) => Finding::problem(what, "update the NVIDIA driver"),
        NoGpu::Failed { .. } => Finding::problem(what, "see the kernel log (dmesg); nvidia-smi must work first"),
    }
}

/// Where the kernels would come from. Without a GPU nothing here is a problem yet.
fn kernels(toolkit: &Toolkit, has_gpu: bool) -> Vec<Finding> {
    let missing = |what: String, fix: &str| match has_gpu {
        true => Finding::problem(what, fix),
        false => Finding::note(format!("{what} (a GPU would need it)"), fix),
    };
    let mut findings = Vec::new();
    if toolkit.built_in {
        findings.push(Finding::ok("GPU kernels: built in"));
    } else {
        findings.push(match &toolkit.nvrtc {
            Ok(()) => Finding::ok("GPU kernels: compiled by NVRTC when they are needed first"),
            Err(why) => missing(
                format!("GPU kernels: not built in, and NVRTC cannot be opened: {why}"),
                "install the CUDA toolkit or `pip install nvidia-cuda-nvrtc`, or set CUDA_HOME",
            ),
        });
        findings.push(compile_cache(toolkit.cache.as_deref()));
    }
    findings.push(match (&toolkit.cublas, has_gpu) {
        (Ok(()), _) => Finding::ok("cuBLASLt: can be opened"),
        (Err(why), true) => Finding::note(
            format!("cuBLASLt cannot be opened: {why}; --linear auto takes the fused kernels, slower for long prompts"),
            "install the CUDA toolkit or `pip install nvidia-cublas`, or set CUDA_HOME",
        ),
        (Err(why), false) => Finding::ok(format!("cuBLASLt cannot be opened: {why} (a GPU could use it)")),
    });
    findings
}

fn compile_cache(folder: Option<&Path>) -> Finding {
    let fix = "set XDG_CACHE_HOME to a folder that can be written, or kernels are compiled at every start";
    let Some(folder) = folder else {
        return Finding::note("compiled kernels: no place to keep them, HOME is not set", fix);
    };
    let shown = folder.display();
    if folder.is_dir() {
        let probe = folder.join(format!(".doctor.{}", std::process::id()));
        let written = fs::File::create_new(&probe).and_then(|_| fs::remove_file(&probe));
        return match written {
            Ok(()) => Finding::ok(format!("compiled kernels: kept in {shown}, {} there", cubins(folder))),
            Err(e) => Finding::note(format!("compiled kernels: {shown} cannot be written: {e}"), fix),
        };
    }
    match fs::metadata(folder) {
        Ok(_) => Finding::note(format!("compiled kernels: {shown} is not a folder"), fix),
        Err(_) => Finding::ok(format!("compiled kernels: will be kept in {shown}")),
    }
}

fn cubins(folder: &Path) -> usize {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    files.filter(|file| file.path().extension().is_some_and(|e| e == "cubin")).count()
}

fn memory(available: Option<u64>) -> Finding {
    match available {
        None => Finding::note("free memory: unknown, /proc/meminfo cannot be read", "mount /proc"),
        Some(bytes) if bytes < 2 << 30 => Finding::note(
            format!("free memory: {}", size::show(bytes)),
            "end other programs; `plan` says what a model and its context need",
        ),
        Some(bytes) => Finding::ok(format!("free memory: {}", size::show(bytes))),
    }
}

/// The least memory limit of the control groups that this process is in, and of those above them.
fn group_memory(root: &Path) -> Finding {
    match group_limit(root) {
        Some(bytes) => Finding::note(
            format!("memory limit: the control group grants {}", size::show(bytes)),
            "raise memory.max of the group (containers: --memory) if models or caches do not fit",
        ),
        None => Finding::ok("memory limit: none by a control group"),
    }
}

fn group_limit(root: &Path) -> Option<u64> {
    let groups = read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mount = root.join("sys/fs/cgroup");
    let below = |mount: &Path, path: &str| -> Vec<PathBuf> {
        let group = mount.join(path.trim_start_matches('/'));
        group.ancestors().take_while(|folder| folder.starts_with(mount)).map(Path::to_owned).collect()
    };
    let mut folders = vec![mount.clone(), mount.join("memory")];
    for line in groups.lines() {
        match line.splitn(3, ':').collect::<Vec<_>>()[..] {
            [_, "", path] => folders.extend(below(&mount, path)),
            [_, controllers, path] if controllers.split(',').any(|c| c == "memory") => {
                folders.extend(below(&mount.join("memory"), path));
            }
            _ => {}
        }
    }
    let limit = |file: PathBuf| read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let files = folders.iter().flat_map(|f| [f.join("memory.max"), f.join("memory.limit_in_bytes")]);
    // Version 1 writes no limit as the largest multiple of a page.
    files.filter_map(limit).filter(|&bytes| bytes < 1 << 60).min()
}

fn locking(limit: Option<u64>, locked: Option<u64>) -> Finding {
    let locked = locked.map_or("unknown".to_string(), size::show);
    match limit {
        None => Finding::ok(format!("locked memory: no limit, {locked} locked")),
        Some(limit) => Finding::note(
            format!(
                "locked memory: at most {} (RLIMIT_MEMLOCK), {locked} locked; --mlock needs the host KV's size",
                size::show(limit)
            ),
            "`ulimit -l unlimited` (systemd: LimitMEMLOCK=infinity, containers: --ulimit memlock=-1)",
        ),
    }
}

fn huge_pages(root: &Path) -> Vec<Finding> {
    let meminfo = read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()
    };
    let reserved = match (field("HugePages_Total"), field("HugePages_Free")) {
        (Some(total), Some(free)) if total > 0 => Finding::ok(format!("huge pages: {total} reserved, {free} free")),
        _ => Finding::ok("huge pages: none reserved (vm.nr_hugepages)"),
    };
    let modes = read_to_string(root.join("sys/kernel/mm/transparent_hugepage/enabled")).unwrap_or_default();
    let mode = modes.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(mode, _)| mode);
    let transparent = match mode {
        Some("never") => Finding::note(
            "transparent huge pages: never; gathers from host KV meet more TLB misses",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, as root",
        ),
        Some(mode) => Finding::ok(format!("transparent huge pages: {mode}")),
        None => Finding::note(
            "transparent huge pages: unknown, this kernel does not say",
            "nothing, if reserved ones are there",
        ),
    };
    vec![reserved, transparent]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(name: &str, files: &[(&str, &str)]) -> PathBuf {
        let root = std::env::temp_dir().join(format!("specache-doctor-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        for (file, text) in files {
            let file = root.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        root
    }

    #[test]
    fn a_system_that_says_nothing() {
        let root = root("bare", &[]);
        assert_eq!(group_limit(&root), None);
        let lines: Vec<_> = huge_pages(&root).iter().map(Finding::to_string).collect();
        assert!(lines[0].contains("none reserved") && lines[1].contains("unknown"), "{lines:?}");
        assert_eq!(memory(None).state, State::Note);
        assert!(locking(Some(8 << 20), None).to_string().contains("at most 8.0 MiB (RLIMIT_MEMLOCK), unknown locked"));
    }

    #[test]
    fn limits_and_pages_are_read() {
        let files = [
            ("proc/self/cgroup", "0::/box/inner\n"),
            ("sys/fs/cgroup/box/memory.max", "1073741824\n"),
            ("sys/fs/cgroup/box/inner/memory.max", "max\n"),
            ("proc/meminfo", "MemFree: 1 kB\nHugePages_Total:      12\nHugePages_Free:        7\n"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n"),
        ];
        let root = root("limits", &files);
        assert_eq!(group_limit(&root), Some(1 << 30));
        let [reserved, transparent] = &huge_pages(&root)[..] else { panic!() };
        assert!(reserved.what.contains("12 reserved, 7 free"), "{reserved}");
        assert_eq!(transparent.state, State::Note);
        assert!(transparent.to_string().contains("echo madvise"), "{transparent}");
        let v1 = [("proc/self/cgroup", "4:memory:/a\n"), ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "2097152\n")];
        assert_eq!(group_limit(&self::root("v1", &v1)), Some(2 << 20));
    }

    #[test]
    fn what_a_gpu_needs_is_a_problem_only_beside_one() {
        let none =
            Toolkit { built_in: false, nvrtc: Err("nowhere".into()), cublas: Err("nowhere".into()), cache: None };
        let states = |has_gpu| kernels(&none, has_gpu).iter().map(|f| f.state).collect::<Vec<_>>();
        assert_eq!(states(true), [State::Problem, State::Note, State::Note]);
        assert_eq!(states(false), [State::Note, State::Note, State::Ok]);
        assert_eq!(no_gpu(&NoGpu::TooOld(11_000)).state, State::Problem);
    }
}
