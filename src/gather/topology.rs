//! Which CPUs sit next to which memory, and how many of them this process may keep busy.
//!
//! From `/sys/devices/system/node`, restricted to the CPUs that are online and that the process's affinity mask
//! allows; the number of threads also to the control group's CPU quota. Whatever is missing or broken is left out and
//! noted: a machine without any of it is one node with the allowed CPUs.

use std::fmt::Write;
use std::fs::{read_dir, read_to_string};
use std::path::Path;

use super::{affinity, cpulist, quota};

/// A NUMA node by the kernel's number. Numbers may have holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

/// A node with memory, and the CPUs next to it that this process may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// Its usable CPUs, and those of nodes without memory that are nearest to it, ascending; at least one.
    pub cpus: Vec<usize>,
}

/// The nodes of a machine, as far as this process may use them.
#[derive(Clone, Debug, PartialEq)]
pub struct Topology {
    nodes: Vec<Node>,
    /// Nodes without a usable CPU (memory expanders, sockets that are not allowed), each with the index in `nodes` of
    /// the nearest one that has some.
    memory_only: Vec<(NodeId, usize)>,
    quota: Option<f64>,
    notes: Vec<String>,
}

impl Topology {
    /// The topology of this machine.
    pub fn detect() -> Topology {
        Topology::read(Path::new("/"), affinity::allowed().ok().as_deref())
    }

    /// The topology that the files under `root` describe (`root` is `/` but in tests), restricted to the CPUs in
    /// `allowed`; `None` allows all.
    pub fn read(root: &Path, allowed: Option<&[usize]>) -> Topology {
        let mut notes = Vec::new();
        let usable = usable_cpus(root, allowed, &mut notes);
        let dir = root.join("sys/devices/system/node");
        let (mut nodes, mut bare) = read_nodes(&dir, usable.as_deref(), &mut notes);
        join_to_memory(&dir, &mut nodes, &mut bare, &mut notes);
        if nodes.is_empty() {
            notes.push("no NUMA node with a usable CPU is known; taken as one node".into());
            let cpus = usable.filter(|cpus| !cpus.is_empty()).unwrap_or_else(assumed_cpus);
            nodes.push(Node { id: NodeId(0), cpus });
        }
        let home = |&id: &NodeId| (id, nearest(&dir, id, nodes.iter().map(|node| node.id)).unwrap_or(0));
        let memory_only = bare.iter().map(home).collect();
        Topology { nodes, memory_only, quota: quota::cpus(root), notes }
    }

    /// A topology of given nodes, for tests and for those who know better. Nodes without CPUs are left out.
    ///
    /// # Panics
    /// If no node is left.
    pub fn of(nodes: Vec<Node>) -> Topology {
        let nodes: Vec<Node> = nodes.into_iter().filter(|node| !node.cpus.is_empty()).collect();
        assert!(!nodes.is_empty(), "a topology has a node with CPUs");
        Topology { nodes, memory_only: Vec::new(), quota: None, notes: Vec::new() }
    }

    /// The nodes with memory and usable CPUs, by ascending number; at least one.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// CPUs that the control group's quota is worth, if there is one.
    pub fn quota(&self) -> Option<f64> {
        self.quota
    }

    /// Threads that can run at once: the usable CPUs, or the quota if that is less, but at least 1. A quota of 2.5 CPUs
    /// gives 3: two threads would leave half a CPU unused.
    pub fn threads(&self) -> usize {
        let cpus = self.nodes.iter().map(|node| node.cpus.len()).sum::<usize>();
        let quota = self.quota.map_or(cpus, |quota| quota.ceil() as usize);
        cpus.min(quota).max(1)
    }

    /// Where in [`Topology::nodes`] the CPUs for the memory of node `id` are: its own, the nearest ones for a node
    /// without, and those of the first node for one that is unknown.
    pub fn home(&self, id: NodeId) -> usize {
        let own = self.nodes.iter().position(|node| node.id == id);
        own.or_else(|| self.memory_only.iter().find(|(bare, _)| *bare == id).map(|&(_, home)| home)).unwrap_or(0)
    }

    /// Where in [`Topology::nodes`] the CPU numbered `cpu` is.
    pub fn node_of_cpu(&self, cpu: usize) -> Option<usize> {
        self.nodes.iter().position(|node| node.cpus.binary_search(&cpu).is_ok())
    }

    /// What was found, in a line or a few: for logs.
    pub fn describe(&self) -> String {
        let mut text = match self.nodes.len() {
            1 => "1 NUMA node".into(),
            n => format!("{n} NUMA nodes"),
        };
        let cpus = |node: &Node| format!("node {}: {} CPUs", node.id.0, node.cpus.len());
        let nodes: Vec<String> = self.nodes.iter().map(cpus).collect();
        let _ = write!(text, " ({})", nodes.join(", "));
        for (bare, home) in &self.memory_only {
            let _ = write!(text, "; node {} has no usable CPU, served by node {}", bare.0, self.nodes[*home].id.0);
        }
        if let Some(quota) = self.quota {
            let _ = write!(text, "; quota of {quota:.1} CPUs");
        }
        for note in &self.notes {
            let _ = write!(text, "; {note}");
        }
        text
    }
}

/// Online and allowed CPUs; `None` if neither is known.
fn usable_cpus(root: &Path, allowed: Option<&[usize]>, notes: &mut Vec<String>) -> Option<Vec<usize>> {
    let file = root.join("sys/devices/system/cpu/online");
    let online = read_to_string(&file).ok().and_then(|list| {
        let cpus = cpulist::parse(&list);
        if cpus.is_none() {
            notes.push(format!("{} cannot be read: {:?}", file.display(), list.trim()));
        }
        cpus
    });
    match (online, allowed) {
        (Some(online), Some(allowed)) => Some(online.into_iter().filter(|cpu| allowed.contains(cpu)).collect()),
        (online, allowed) => online.or(allowed.map(<[usize]>::to_vec)),
    }
}

/// What is left when no file and no system call tells: as many CPUs as the standard library finds.
fn assumed_cpus() -> Vec<usize> {
    (0..std::thread::available_parallelism().map_or(1, usize::from)).collect()
}

/// The nodes with usable CPUs, and the numbers of those without.
fn read_nodes(dir: &Path, usable: Option<&[usize]>, notes: &mut Vec<String>) -> (Vec<Node>, Vec<NodeId>) {
    let (mut nodes, mut bare) = (Vec::new(), Vec::new());
    for id in node_ids(dir) {
        let file = dir.join(format!("node{}/cpulist", id.0));
        let list = read_to_string(&file).unwrap_or_else(|e| e.to_string());
        let Some(cpus) = cpulist::parse(&list) else {
            notes.push(format!("{} cannot be read: {:?}", file.display(), list.trim()));
            continue;
        };
        let cpus: Vec<usize> = cpus.into_iter().filter(|cpu| usable.is_none_or(|u| u.contains(cpu))).collect();
        if cpus.is_empty() { bare.push(id) } else { nodes.push(Node { id, cpus }) }
    }
    (nodes, bare)
}

/// The numbers of the `node*` folders, ascending, without those that `online` leaves out.
fn node_ids(dir: &Path) -> Vec<NodeId> {
    let online = read_to_string(dir.join("online")).ok().and_then(|list| cpulist::parse(&list));
    let entries = read_dir(dir).into_iter().flatten().flatten();
    let number = |name: std::ffi::OsString| name.to_str()?.strip_prefix("node")?.parse::<u32>().ok();
    let mut ids: Vec<NodeId> = entries.filter_map(|entry| number(entry.file_name())).map(NodeId).collect();
    ids.retain(|id| online.as_ref().is_none_or(|online| online.contains(&(id.0 as usize))));
    ids.sort_unstable();
    ids
}

/// A node without memory holds no pages: its CPUs are taken with those of the nearest node that has some. Nodes without
/// either are left out. `has_memory` is as old as Linux 2.6.24; where it is missing every node counts as having memory.
fn join_to_memory(dir: &Path, nodes: &mut Vec<Node>, bare: &mut Vec<NodeId>, notes: &mut Vec<String>) {
    let list = read_to_string(dir.join("has_memory")).ok().and_then(|list| cpulist::parse(&list));
    let Some(list) = list.filter(|list| !list.is_empty()) else { return };
    let has_memory = |id: NodeId| list.contains(&(id.0 as usize));
    bare.retain(|&id| has_memory(id));
    let (with, without): (Vec<Node>, Vec<Node>) = nodes.drain(..).partition(|node| has_memory(node.id));
    let homes: Vec<NodeId> = with.iter().map(|node| node.id).chain(bare.iter().copied()).collect();
    *nodes = with;
    for Node { id, cpus } in without {
        let home = nearest(dir, id, homes.iter().copied()).map_or(id, |i| homes[i]);
        notes.push(format!("node {} has no memory, its CPUs are taken with node {}", id.0, home.0));
        match nodes.iter_mut().find(|node| node.id == home) {
            Some(node) => node.cpus.extend(cpus),
            None => nodes.push(Node { id: home, cpus }),
        }
        bare.retain(|&id| id != home);
    }
    nodes.iter_mut().for_each(|node| node.cpus.sort_unstable());
    nodes.sort_unstable_by_key(|node| node.id);
}

/// Which of some nodes is nearest to `id`, by the kernel's distance table: one number per online node, in order. The
/// first of equals; a node that the table lacks comes last.
fn nearest(dir: &Path, id: NodeId, among: impl Iterator<Item = NodeId>) -> Option<usize> {
    let ids = node_ids(dir);
    let table = read_to_string(dir.join(format!("node{}/distance", id.0))).unwrap_or_default();
    let row: Vec<u32> = table.split_whitespace().map_while(|d| d.parse().ok()).collect();
    let distance = |id: NodeId| ids.iter().position(|&i| i == id).and_then(|column| row.get(column));
    among.map(|id| distance(id).copied().unwrap_or(u32::MAX)).enumerate().min_by_key(|&(_, far)| far).map(|(i, _)| i)
}
