//! Who makes the matrix products of a GPU.

/// How a GPU computes the dense part of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LinearPath {
    /// The fused kernels for at most [`LinearPath::AUTO_ROWS`] rows, cuBLASLt for more; the fused kernels alone where
    /// cuBLASLt or its workspace cannot be had (a line says so: [`crate::notice`]) and for fp32 weights.
    #[default]
    Auto,
    /// The fused kernels, for any number of rows: sixteen at a time.
    Fused,
    /// cuBLASLt, for any number of rows.
    Cublas,
}

impl LinearPath {
    /// All of them.
    pub const ALL: [LinearPath; 3] = [LinearPath::Auto, LinearPath::Fused, LinearPath::Cublas];

    /// Rows of one launch of the fused kernels. With more they read every weight again, and cuBLASLt does not.
    pub const FUSED_ROWS: usize = 16;

    /// Rows up to which the fused kernels are the faster ones. On an H200 a step of Llama-3-8B at 8k takes 0.89 of
    /// cuBLASLt's time with one row, 0.96 with eight and 1.06 with sixteen, where each CTA reads as much of x as of the
    /// weights (docs/measurements/2026-11-26-h200-second.md).
    pub const AUTO_ROWS: usize = 8;

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            LinearPath::Auto => "auto",
            LinearPath::Fused => "fused",
            LinearPath::Cublas => "cublas",
        }
    }
}
