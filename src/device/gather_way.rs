//! Who brings a GPU the pairs that it has selected.

/// How the pairs of a selection come from pinned host memory into a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GatherWay {
    /// A kernel on a few of the GPU's multiprocessors reads them where they are. Steps can be CUDA graphs.
    Gpu,
    /// The CPU device's only way; on a GPU, threads of the host gather them into a block that is copied at once, so that no
    /// multiprocessor waits for the bus. The GPU rings a bell for every layer, and its queue waits for the host's answer;
    /// the kernels of a step are launched one by one.
    Cpu,
    /// On a GPU: the first steps with so many sequences go either way, and the rest the faster one. A line says which
    /// ([`crate::notice`]).
    Auto,
}

impl GatherWay {
    /// All of them.
    pub const ALL: [GatherWay; 3] = [GatherWay::Gpu, GatherWay::Cpu, GatherWay::Auto];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            GatherWay::Gpu => "gpu",
            GatherWay::Cpu => "cpu",
            GatherWay::Auto => "auto",
        }
    }
}
