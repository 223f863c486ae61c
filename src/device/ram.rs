//! How much memory this machine has left.

use std::fs::read_to_string;
use std::path::Path;

use crate::cgroup::Limits;

/// Bytes that a process may still take without swapping: `MemAvailable` of Linux, or what its control groups leave if
/// that is less. `None` where the system does not say.
pub fn available() -> Option<u64> {
    available_in(Path::new("/"))
}

/// `root` is `/` but in tests.
fn available_in(root: &Path) -> Option<u64> {
    let machine = mem_available(&read_to_string(root.join("proc/meminfo")).ok()?)?;
    let groups = Limits { controller: "memory", mounts: &["memory"], v1, v2 };
    Some(groups.least(root).map_or(machine, |group| group.min(machine)))
}

/// `MemAvailable` in the text of `/proc/meminfo`.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What the limit of a control group of version 2 leaves; `memory.max` holds `max` where there is none.
fn v2(group: &Path) -> Option<u64> {
    left(group, "memory.max", "memory.current", "inactive_file ")
}

/// As [`v2`] of version 1, which has a huge number where there is no limit.
fn v1(group: &Path) -> Option<u64> {
    left(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
}

/// Pages of files can be dropped, so they count as free.
fn left(group: &Path, limit: &str, used: &str, files: &str) -> Option<u64> {
    let read = |file: &str| read_to_string(group.join(file)).ok();
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let (limit, used) = (number(&read(limit)?)?, number(&read(used)?)?);
    let stat = read("memory.stat").unwrap_or_default();
    let files = stat.lines().find_map(|line| number(line.strip_prefix(files)?)).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(files)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        assert_eq!(mem_available("MemTotal: 9 kB\nMemAvailable:    1234 kB\n"), Some(1234 * 1024));
        assert_eq!(mem_available("MemTotal: 9 kB\n"), None);
        assert!(cfg!(not(target_os = "linux")) || available().is_some());
    }

    /// The least of what the machine, the group of the process and those above it leave, in both versions.
    #[test]
    fn limits_of_control_groups() {
        let available = |files: &[(&str, &str)]| {
            let root = std::env::temp_dir().join(format!("specache-ram-{}", std::process::id()));
            for (file, text) in [("proc/meminfo", "MemAvailable: 1000 kB\n")].iter().chain(files) {
                let file = root.join(file);
                std::fs::create_dir_all(file.parent().unwrap()).unwrap();
                std::fs::write(file, text).unwrap();
            }
            let available = available_in(&root);
            std::fs::remove_dir_all(root).unwrap();
            available
        };
        assert_eq!(available(&[]), Some(1_024_000));
        let v2 = [
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.current", "70000\n"),
            ("sys/fs/cgroup/a/memory.max", "100000\n"),
            ("sys/fs/cgroup/a/memory.current", "80000\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 5000\n"),
        ];
        assert_eq!(available(&v2), Some(25_000), "the group above");
        let v1 = [
            ("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/1\n"),
            ("sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes", "50000\n"),
            ("sys/fs/cgroup/memory/docker/1/memory.usage_in_bytes", "20000\n"),
            ("sys/fs/cgroup/memory/docker/1/memory.stat", "inactive_file 1\ntotal_inactive_file 300\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n"),
        ];
        assert_eq!(available(&v1), Some(30_300));
        let mounted = [
            ("proc/self/cgroup", "0::/the/hosts/path\n"),
            ("sys/fs/cgroup/memory.max", "4096\n"),
            ("sys/fs/cgroup/memory.current", "5000\n"),
        ];
        assert_eq!(available(&mounted), Some(0), "a container's mount is its group");
    }
}
