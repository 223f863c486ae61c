//! Passes that have become CUDA graphs.

use std::ops::Range;

use super::{Group, Place, Workspace};
use crate::cuda::weights::GpuModel;
use crate::device::Device;
use crate::device::cuda::graph::Exclusive;
use crate::error::Result;
use crate::kv::{KvMode, KvShape};

/// Sequences, rows, mode, shape and top-k of a group.
pub(super) type GroupKey = (Range<usize>, Range<usize>, KvMode, KvShape, u32);

/// Everything that a pass's launches depend on, apart from what it is told: passes with equal keys have equal graphs.
#[derive(Clone, PartialEq)]
pub(super) struct Key {
    pub(super) model: usize,
    pub(super) turn: usize,
    pub(super) with_selections: bool,
    pub(super) groups: Vec<GroupKey>,
    /// Of the two modes that fetch: whether there is anything to select.
    pub(super) selects: [bool; 2],
}

/// Graphs that are kept: for both turns of a step and a pre-decode, of some sizes of a batch.
pub(super) const GRAPHS: usize = 16;

impl Workspace {
    /// Begins a pass that was seen before as a graph: it becomes one the second time, and is replayed from then on. `None`:
    /// the pass goes to the driver call by call. `with_selections` as in [`Workspace::end`]; `is_step`: it is no pre-decode.
    ///
    /// Not where somebody wants to know when each operation runs, nor where the GPU waits for threads of the host, nor in
    /// `offload`, whose copies come from other pages when the sequence has grown, nor with drivers that cannot capture launches
    /// which overlap (before CUDA 12.3).
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(crate) fn begin_graph<'a>(
        &mut self,
        device: &'a Device,
        model: &GpuModel,
        places: &[Place],
        with_selections: bool,
        is_step: bool,
    ) -> Result<Option<Exclusive<'a>>> {
        let gpu = device.gpu().expect("a GPU's workspace");
        let timed = device.measures_waits() || device.trace().is_some();
        self.choose_gather(device, places.iter().any(|place| place.selects), is_step && !timed);
        let offload = self.groups.iter().any(|group| group.mode == KvMode::Offload);
        if offload || timed || self.gathers_on_host() || !device.options().graph || gpu.facts().gpu.driver < 12_030 {
            return Ok(None);
        }
        let selects = |mode| places.iter().any(|place| place.options.mode == mode && place.selects);
        let key = Key {
            model: std::ptr::from_ref(model).addr(),
            turn: self.memory().turn ^ 1,
            with_selections,
            groups: self.groups.iter().map(Group::key).collect(),
            selects: [selects(KvMode::SpeCache), selects(KvMode::Fetch)],
        };
        let seen = self.graphs.iter().position(|(seen, _)| *seen == key);
        let graph = seen.map(|i| self.graphs.remove(i).1);
        // The first time loads kernels and permits them their shared memory.
        let pass = graph.clone().map(|graph| Exclusive::begin(gpu.queues(), graph)).transpose()?;
        self.graphs.push((key, graph.flatten()));
        if self.graphs.len() > GRAPHS {
            self.graphs.remove(0); // its last pass is over: every call waits for its own
        }
        Ok(pass)
    }

    /// The end of a pass that [`Workspace::begin_graph`] began: the GPU is given its graph.
    ///
    /// # Errors
    /// [`crate::Error::Device`]; nothing of the pass has run then.
    pub(crate) fn end_graph(&mut self, pass: Exclusive<'_>) -> Result<()> {
        let graph = pass.end()?;
        self.graphs.last_mut().expect("this pass's").1 = Some(graph);
        Ok(())
    }
}
