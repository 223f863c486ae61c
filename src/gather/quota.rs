//! How much CPU time the control group grants, in CPUs.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

/// The smallest quota that holds for this process, as a number of CPUs; `None` if there is none. `root` is `/` but in
/// tests.
///
/// Every group above ours limits us as well, so all of them are read. Within a container the path in
/// `/proc/self/cgroup` may be the host's and lead nowhere; its ancestors end at the mount, which is then our group.
pub(crate) fn cpus(root: &Path) -> Option<f64> {
    let groups = read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mount = root.join("sys/fs/cgroup");
    let mut least = [v2(&mount), v1(&mount.join("cpu")), v1(&mount.join("cpu,cpuacct"))];
    for group in groups.lines() {
        // `hierarchy:controllers:path`, where version 2 has the hierarchy 0 and no controllers.
        let mut fields = group.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        if controllers.is_empty() {
            least[0] = lesser(least[0], least_up(&mount, path, v2));
            least[0] = lesser(least[0], least_up(&mount.join("unified"), path, v2));
        } else if controllers.split(',').any(|c| c == "cpu") {
            least[1] = lesser(least[1], least_up(&mount.join("cpu"), path, v1));
            least[2] = lesser(least[2], least_up(&mount.join(controllers), path, v1));
        }
    }
    least.into_iter().fold(None, lesser)
}

/// The least quota from the group `path` up to the mount.
fn least_up(mount: &Path, path: &str, quota: fn(&Path) -> Option<f64>) -> Option<f64> {
    let mut group: PathBuf = mount.join(path.trim_start_matches('/'));
    let mut least = quota(mount);
    while group.starts_with(mount) && group != mount {
        least = lesser(least, quota(&group));
        group.pop();
    }
    least
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

fn lesser(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
