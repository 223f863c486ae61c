//! How much CPU time the control group grants, in CPUs.

use std::fs::read_to_string;
use std::path::Path;

use crate::cgroup::Limits;

/// The smallest quota that holds for this process, as a number of CPUs; `None` if there is none. `root` is `/` but in
/// tests.
pub(crate) fn cpus(root: &Path) -> Option<f64> {
    Limits { controller: "cpu", mounts: &["cpu", "cpu,cpuacct"], v1, v2 }.least(root)
}

/// Version 2: `cpu.max` holds quota and period in microseconds, or `max` for no quota.
fn v2(group: &Path) -> Option<f64> {
    let limit = read_to_string(group.join("cpu.max")).ok()?;
    let mut fields = limit.split_whitespace();
    share(fields.next()?, fields.next().unwrap_or("100000"))
}

/// Version 1: two files, and -1 for no quota.
fn v1(group: &Path) -> Option<f64> {
    let quota = read_to_string(group.join("cpu.cfs_quota_us")).ok()?;
    let period = read_to_string(group.join("cpu.cfs_period_us")).ok()?;
    share(quota.trim(), period.trim())
}

fn share(quota: &str, period: &str) -> Option<f64> {
    let (quota, period) = (quota.parse::<i64>().ok()?, period.parse::<i64>().ok()?);
    (quota > 0 && period > 0).then(|| quota as f64 / period as f64)
}
