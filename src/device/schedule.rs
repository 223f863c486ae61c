//! The three ways in which computation waits for copies.

/// How the compute stream waits for prefetched pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Schedule {
    /// Each layer's fetch is waited for where it is issued.
    Serial,
    /// A second stream, a copy per sequence and layer, and before each attention a wait for everything that stream has
    /// been given: what the paper describes.
    Stream,
    /// One copy per layer for the whole batch, and each layer waits for its own event of the step before.
    #[default]
    Event,
}

impl Schedule {
    /// All of them, the slowest first.
    pub const ALL: [Schedule; 3] = [Schedule::Serial, Schedule::Stream, Schedule::Event];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Schedule::Serial => "serial",
            Schedule::Stream => "stream",
            Schedule::Event => "event",
        }
    }
}
