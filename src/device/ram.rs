//! How much memory this machine has left.

/// Bytes that a process may still take without swapping: `MemAvailable` of Linux, or what its control group leaves if
/// that is less. `None` where the system does not say.
pub fn available() -> Option<u64> {
    let machine = mem_available(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
    Some(group_available().map_or(machine, |group| group.min(machine)))
}

/// `MemAvailable` in the text of `/proc/meminfo`.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What the limit of a container's control group (version 2) leaves; pages of files can be dropped, so they count as
/// free.
fn group_available() -> Option<u64> {
    let read = |file: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok();
    let number = |text: String| text.trim().parse::<u64>().ok();
    let (max, current) = (number(read("memory.max")?)?, number(read("memory.current")?)?);
    let stat = read("memory.stat")?;
    let files = stat.lines().find_map(|line| line.strip_prefix("inactive_file "))?.trim().parse().ok()?;
    Some(max.saturating_sub(current.saturating_sub(files)))
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
}
