//! Gather against plain copies: shapes, instruction sets, nodes and threads.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use specache::cpu::Isa;
use specache::gather::{
    Gather, GatherOptions, Node, NodeId, NodeShare, Rows, Staging, Stores, Topology, node_of_address,
};

fn node(id: u32, cpus: &[usize]) -> Node {
    Node { id: NodeId(id), cpus: cpus.to_vec() }
}

fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 31 + i / 251) as u8).collect()
}

/// One gather, checked byte by byte: rows `from` of `row_bytes` at an odd offset, to `slots`, with bytes between that
/// must stay.
fn check(gather: &Gather, row_bytes: usize, offset: usize, from: &[usize], slots: &[usize], stores: Stores) {
    let n_source = from.iter().max().map_or(0, |max| max + 1);
    let source = pattern(n_source * row_bytes + offset);
    let source = &source[offset..];
    let n_slots = slots.iter().max().map_or(0, |max| max + 1);
    let mut block = vec![0xEE; n_slots * row_bytes + offset + 7];
    let mut expected = block.clone();
    for (&from, &slot) in from.iter().zip(slots) {
        expected[offset + slot * row_bytes..][..row_bytes].copy_from_slice(&source[from * row_bytes..][..row_bytes]);
    }
    let rows = Rows {
        n_rows: from.len(),
        row_bytes,
        source: |i: usize| &source[from[i] * row_bytes..][..row_bytes],
        // Node 5 is in no topology here.
        node: |i: usize| NodeId([0, 1, 5][from[i] % 3]),
    };
    let stats = gather.gather(&rows, Staging { bytes: &mut block[offset..], slot: |i| slots[i] }, stores);
    assert_eq!(stats.bytes, (from.len() * row_bytes) as u64);
    assert!(block == expected, "{} rows of {row_bytes} bytes, {stores:?}", from.len());
}

/// Every instruction set, on one node and on two (on this machine: the same CPU twice), alone and with helpers.
fn gathers() -> Vec<Gather> {
    let topologies = [vec![node(0, &[0])], vec![node(0, &[0]), node(1, &[0, 1])]];
    let mut all = Vec::new();
    for isa in Isa::available() {
        for (nodes, threads) in [(0, 1), (0, 3), (1, 4)] {
            let options = GatherOptions { threads: Some(threads), isa, alone_below: 0, ..Default::default() };
            all.push(Gather::new(Topology::of(topologies[nodes].clone()), options).unwrap());
        }
    }
    all
}

/// Lengths around a line and around the step of four lines, and pairs of real models.
#[test]
fn edge_shapes() {
    for gather in gathers() {
        for row_bytes in [1, 2, 63, 64, 65, 100, 127, 128, 255, 256, 257, 320, 511, 512, 513, 1000, 2048, 9000] {
            for n in [0, 1, 2, 15, 16, 17, 33, 150] {
                let from: Vec<usize> = (0..n).map(|i| i * 7 % 40).collect();
                let ascending: Vec<usize> = (0..n).map(|i| i + i / 3).collect();
                let descending: Vec<usize> = ascending.iter().rev().copied().collect();
                check(&gather, row_bytes, n % 5, &from, &ascending, Stores::Temporal);
                check(&gather, row_bytes, n % 3 * 32, &from, &descending, Stores::NonTemporal);
            }
        }
    }
}

#[test]
fn random_shapes() {
    let gathers = gathers();
    let shape = (1..1200usize, 0..70usize, proptest::collection::vec(0..300usize, 0..400), any::<u64>(), 0..99usize);
    let config = ProptestConfig { cases: 200, ..Default::default() };
    proptest!(config, |((row_bytes, offset, from, seed, which) in shape)| {
        // Distinct slots in a scrambled order: multiplication by an odd number permutes 0..512.
        let slots: Vec<usize> = (0..from.len()).map(|i| i.wrapping_mul(seed as usize | 1) % 512).collect();
        let stores = if seed >> 60 & 1 == 0 { Stores::Temporal } else { Stores::NonTemporal };
        check(&gathers[which % gathers.len()], row_bytes, offset, &from, &slots, stores);
    });
}

/// Several threads share one gather: one has the helpers, the others do their work alone.
#[test]
fn callers_at_once() {
    let options = GatherOptions { threads: Some(2), alone_below: 0, ..Default::default() };
    let gather = Gather::new(Topology::detect(), options).unwrap();
    std::thread::scope(|scope| {
        for caller in 0..3 {
            let gather = &gather;
            scope.spawn(move || {
                for round in 0..60 {
                    let from: Vec<usize> = (0..200).map(|i| (i * (caller + 2) + round) % 97).collect();
                    let slots: Vec<usize> = (0..200).collect();
                    check(gather, 512, 0, &from, &slots, Stores::NonTemporal);
                }
            });
        }
    });
}

fn gather_slots(threads: usize, slot: impl Fn(usize) -> usize) {
    let options = GatherOptions { threads: Some(threads), alone_below: 0, ..Default::default() };
    let gather = Gather::new(Topology::detect(), options).unwrap();
    let (source, mut block) = (pattern(64), vec![0; 640]);
    let rows = Rows { n_rows: 10, row_bytes: 64, source: |_| &source[..], node: |_| NodeId(0) };
    gather.gather(&rows, Staging { bytes: &mut block, slot }, Stores::Temporal);
}

#[test]
#[should_panic(expected = "two rows go to slot 0")]
fn a_slot_twice() {
    gather_slots(2, |i| i % 9);
}

#[test]
#[should_panic(expected = "slot 10 of a staging block of 10")]
fn a_slot_outside() {
    gather_slots(1, |i| i + 1);
}

#[test]
fn this_machine() {
    let topology = Topology::detect();
    assert!(topology.threads() >= 1);
    let gather = Gather::new(topology.clone(), GatherOptions::default()).unwrap();
    assert!(gather.describe().contains("NUMA node"), "{}", gather.describe());
    println!("{}", gather.describe());
    let page = pattern(1 << 16);
    if let Some(node) = node_of_address(page.as_ptr()) {
        assert!(topology.home(node) < topology.nodes().len());
    }
}

/// A file tree for one test, gone when dropped.
struct Tree(PathBuf);

impl Tree {
    fn new(name: &str, files: &[(&str, &str)]) -> Tree {
        let root = std::env::temp_dir().join(format!("specache-gather-{}-{name}", std::process::id()));
        for (file, text) in files {
            let file = root.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        fs::create_dir_all(&root).unwrap();
        Tree(root)
    }

    fn read(&self, allowed: Option<&[usize]>) -> Topology {
        Topology::read(Path::new(&self.0), allowed)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const NODES: &str = "sys/devices/system/node";

#[test]
fn two_sockets() {
    let (node0, node1) = (format!("{NODES}/node0/cpulist"), format!("{NODES}/node1/cpulist"));
    let files = [
        ("sys/devices/system/cpu/online", "0-2,4-7\n"),
        (&*node0, "0-3\n"),
        (&*node1, "4-7\n"),
        ("sys/devices/system/node/possible", "0-1\n"),
    ];
    let tree = Tree::new("two", &files);
    // CPU 3 is offline.
    assert_eq!(tree.read(None).nodes(), [node(0, &[0, 1, 2]), node(1, &[4, 5, 6, 7])]);
    let allowed = tree.read(Some(&[1, 3, 5, 99]));
    assert_eq!(allowed.nodes(), [node(0, &[1]), node(1, &[5])]);
    assert_eq!((allowed.threads(), allowed.node_of_cpu(5), allowed.node_of_cpu(0)), (2, Some(1), None));
    assert!(allowed.describe().starts_with("2 NUMA nodes (node 0: 1 CPUs, node 1: 1 CPUs)"), "{}", allowed.describe());
    // One socket only: the memory of the other is served from here.
    let one = tree.read(Some(&[4, 5]));
    assert_eq!((one.nodes(), one.home(NodeId(0))), (&[node(1, &[4, 5])][..], 0));
}

/// Memory expanders have no CPUs; numbers have holes; the distance table has a column per online node.
#[test]
fn memory_only_nodes_and_holes() {
    let tree = Tree::new(
        "cxl",
        &[
            ("sys/devices/system/node/online", "0,2,4\n"),
            ("sys/devices/system/node/node0/cpulist", "0-1\n"),
            ("sys/devices/system/node/node2/cpulist", "2-3\n"),
            ("sys/devices/system/node/node4/cpulist", "\n"),
            ("sys/devices/system/node/node4/distance", "28 14 10\n"),
            ("sys/devices/system/node/node7/cpulist", "6-7\n"), // Not online.
        ],
    );
    let topology = tree.read(None);
    assert_eq!(topology.nodes(), [node(0, &[0, 1]), node(2, &[2, 3])]);
    assert_eq!([0, 2, 4, 7].map(|id| topology.home(NodeId(id))), [0, 1, 1, 0]);
    assert!(topology.describe().contains("node 4 has no usable CPU, served by node 2"), "{}", topology.describe());
}

/// Gathers rows that lie on these nodes, with as many threads as two a node.
fn gather_from_nodes(topology: Topology, nodes: &[u32]) {
    let threads = 2 * topology.nodes().len();
    let options = GatherOptions { threads: Some(threads), alone_below: 0, ..Default::default() };
    let gather = Gather::new(topology, options).unwrap();
    let source = pattern(1000 * 512);
    let mut block = vec![0; source.len()];
    let rows = Rows {
        n_rows: 1000,
        row_bytes: 512,
        source: |i: usize| &source[i * 512..][..512],
        node: |i: usize| NodeId(nodes[i % nodes.len()]),
    };
    let shares = std::cell::RefCell::new(vec![]);
    let watch = |share: NodeShare| shares.borrow_mut().push(share);
    gather.gather_watched(&rows, Staging { bytes: &mut block, slot: |i| i }, Stores::NonTemporal, Some(&watch));
    assert!(block == source);
    // Every node that serves one of these tells what it did.
    let shares = shares.into_inner();
    let homes = gather.topology().nodes().iter().filter(|node| {
        let home = |&id: &u32| gather.topology().nodes()[gather.topology().home(NodeId(id))].id;
        nodes.iter().any(|id| home(id) == node.id)
    });
    assert!(shares.iter().map(|share| share.node).eq(homes.map(|node| node.id)), "{shares:?}");
    assert_eq!(shares.iter().map(|share| share.bytes).sum::<u64>(), source.len() as u64);
    assert!(shares.iter().all(|share| share.begin <= share.end), "{shares:?}");
}

/// A node with CPUs and no memory holds no page: its CPUs help the nearest node that has some, be it one without CPUs.
#[test]
fn nodes_without_memory() {
    let files = [
        ("sys/devices/system/node/online", "0-3\n"),
        ("sys/devices/system/node/has_memory", "0,2\n"),
        ("sys/devices/system/node/node0/cpulist", "0-1\n"),
        ("sys/devices/system/node/node0/distance", "10 20 28 40\n"),
        ("sys/devices/system/node/node1/cpulist", "2-3\n"),
        ("sys/devices/system/node/node1/distance", "20 10 30 40\n"),
        ("sys/devices/system/node/node2/cpulist", "\n"), // memory only
        ("sys/devices/system/node/node2/distance", "28 30 10 40\n"),
        ("sys/devices/system/node/node3/cpulist", "\n"), // neither
    ];
    let topology = Tree::new("bare", &files).read(None);
    assert_eq!(topology.nodes(), [node(0, &[0, 1, 2, 3])], "arenas are bound to these");
    assert_eq!([0, 1, 2].map(|id| topology.home(NodeId(id))), [0, 0, 0]);
    assert_eq!((topology.node_of_cpu(3), topology.threads()), (Some(0), 4));
    for said in ["node 1 has no memory, its CPUs are taken with node 0", "node 2 has no usable CPU, served by node 0"] {
        assert!(topology.describe().contains(said), "{said}: {}", topology.describe());
    }
    assert!(!topology.describe().contains("node 3"), "{}", topology.describe());
    gather_from_nodes(topology, &[0, 1, 2]);

    // Nearest to the memory without CPUs: it has some now.
    let mut near = files;
    near[5].1 = "30 10 20 40\n";
    let topology = Tree::new("near", &near).read(None);
    assert_eq!(topology.nodes(), [node(0, &[0, 1]), node(2, &[2, 3])]);
    assert_eq!([0, 2].map(|id| topology.home(NodeId(id))), [0, 1]);
    assert!(!topology.describe().contains("no usable CPU"), "{}", topology.describe());
    gather_from_nodes(topology, &[0, 2]);

    // Only the CPUs without memory are allowed.
    let topology = Tree::new("far", &files).read(Some(&[2]));
    assert_eq!((topology.nodes(), topology.home(NodeId(2))), (&[node(0, &[2])][..], 0));
    gather_from_nodes(topology, &[0, 2]);

    // A list that leaves out every node is not believed.
    let mut none = files;
    none[1].1 = "\n";
    assert_eq!(Tree::new("none", &none).read(None).nodes(), [node(0, &[0, 1]), node(1, &[2, 3])]);
}

#[test]
fn broken_and_missing_files() {
    let empty = Tree::new("empty", &[]).read(Some(&[3, 5]));
    assert_eq!(empty.nodes(), [node(0, &[3, 5])]);
    assert!(empty.describe().contains("taken as one node"), "{}", empty.describe());
    assert!(Tree::new("nothing", &[]).read(None).threads() >= 1);

    let tree = Tree::new(
        "broken",
        &[
            ("sys/devices/system/cpu/online", "zero to seven\n"),
            ("sys/devices/system/node/online", "0-\n"),
            ("sys/devices/system/node/node0/cpulist", "0-\n"),
            ("sys/devices/system/node/node1/cpulist", "2-3\n"),
            ("sys/devices/system/node/node2/meminfo", "no cpulist here\n"),
        ],
    );
    let topology = tree.read(None);
    assert_eq!(topology.nodes(), [node(1, &[2, 3])]);
    assert_eq!(topology.describe().matches("cannot be read").count(), 3, "{}", topology.describe());
}

#[test]
fn quotas() {
    let nodes = ("sys/devices/system/node/node0/cpulist", "0-15\n");
    let threads = |name: &str, files: &[(&str, &str)]| {
        let topology = Tree::new(name, &[&[nodes], files].concat()).read(None);
        (topology.quota(), topology.threads())
    };
    assert_eq!(threads("none", &[]), (None, 16));
    assert_eq!(threads("max", &[("sys/fs/cgroup/cpu.max", "max 100000\n")]), (None, 16));
    assert_eq!(threads("v2", &[("sys/fs/cgroup/cpu.max", "250000 100000\n")]), (Some(2.5), 3));
    let nested = [
        ("proc/self/cgroup", "0::/a/b\n"),
        ("sys/fs/cgroup/a/cpu.max", "400000 100000\n"),
        ("sys/fs/cgroup/a/b/cpu.max", "max 100000\n"),
    ];
    assert_eq!(threads("nested", &nested), (Some(4.0), 4));
    let v1 = [
        ("proc/self/cgroup", "4:memory:/x\n2:cpu,cpuacct:/docker/1\n"),
        ("sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us", "50000\n"),
        ("sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us", "100000\n"),
        ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
        ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
    ];
    assert_eq!(threads("v1", &v1), (Some(0.5), 1));
    assert_eq!(threads("junk", &[("sys/fs/cgroup/cpu.max", "lots\n")]), (None, 16));
}
