//! The control groups of this process, of both versions: each of them, and each above it, limits what it may use.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

/// The limits of one kind of resource.
pub(crate) struct Limits<T> {
    /// What version 1 calls its controller.
    pub controller: &'static str,
    /// Folders in which version 1 may be mounted.
    pub mounts: &'static [&'static str],
    /// The limit in the folder of a group of version 1, if there is one.
    pub v1: fn(&Path) -> Option<T>,
    /// As `v1`, of version 2.
    pub v2: fn(&Path) -> Option<T>,
}

impl<T: Copy + PartialOrd> Limits<T> {
    /// The least limit that holds for this process; `None` if there is none. `root` is `/` but in tests.
    ///
    /// Within a container the path in `/proc/self/cgroup` may be the host's and lead nowhere; its ancestors end at the
    /// mount, which is then our group.
    pub fn least(&self, root: &Path) -> Option<T> {
        let groups = read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
        let mount = root.join("sys/fs/cgroup");
        let v1 = |path: &str, least| {
            self.mounts.iter().fold(least, |least, name| lesser(least, least_up(&mount.join(name), path, self.v1)))
        };
        let mut least = v1("/", (self.v2)(&mount));
        for group in groups.lines() {
            // `hierarchy:controllers:path`, where version 2 has the hierarchy 0 and no controllers.
            let mut fields = group.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            if controllers.is_empty() {
                least = lesser(least, least_up(&mount, path, self.v2));
                least = lesser(least, least_up(&mount.join("unified"), path, self.v2));
            } else if controllers.split(',').any(|c| c == self.controller) {
                least = lesser(v1(path, least), least_up(&mount.join(controllers), path, self.v1));
            }
        }
        least
    }
}

/// The least limit from the group `path` up to the mount.
fn least_up<T: Copy + PartialOrd>(mount: &Path, path: &str, limit: fn(&Path) -> Option<T>) -> Option<T> {
    let mut group: PathBuf = mount.join(path.trim_start_matches('/'));
    let mut least = limit(mount);
    while group.starts_with(mount) && group != mount {
        least = lesser(least, limit(&group));
        group.pop();
    }
    least
}

fn lesser<T: PartialOrd>(a: Option<T>, b: Option<T>) -> Option<T> {
    match (a, b) {
        (Some(a), Some(b)) => Some(if b < a { b } else { a }),
        (a, b) => a.or(b),
    }
}
