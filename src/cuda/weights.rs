//! A model in the GPU's memory: one allocation, filled once.

use std::sync::Arc;

use bytemuck::cast_slice;

use super::host_gather::HostGather;
use super::prefill::chunk_rows;
use super::{GpuTarget, dtype_code};
use crate::device::cuda::bindings::abi::SPECACHE_FP32;
use crate::device::cuda::cublas::Cublas;
use crate::device::{Buffer, Device, GatherWay, Kind, LinearPath};
use crate::error::{Error, Result};
use crate::model::rope::RopeTable;
use crate::model::{Dtype, Layer, Linear, Matrix, Model};
use crate::notice;

/// Addresses of a model's tensors, and the memory that they are in.
pub(crate) struct GpuModel {
    _memory: Buffer,
    pub embed: Projection,
    pub layers: Vec<GpuLayer>,
    /// `[hidden]` f32.
    pub final_norm: u64,
    pub lm_head: Projection,
    /// `[head_dim / 2]` f32.
    pub inv_freq: u64,
    /// What makes products beside the fused kernels.
    cublas: Option<Cublas>,
    path: LinearPath,
    /// Rows of a chunk of a prefill.
    pub(super) chunk_rows: usize,
    /// Threads of the host that gather, where they may.
    pub(super) host_gather: Option<Arc<HostGather>>,
}

/// `y = W x + b` on the GPU.
#[derive(Clone, Copy, Default)]
pub(crate) struct Projection {
    /// `[n, k]` of `dtype`.
    pub weight: u64,
    /// `[n]` f32, or 0.
    pub bias: u64,
    pub dtype: u32,
    /// Outputs.
    pub n: u32,
    /// Inputs.
    pub k: u32,
}

impl Projection {
    /// Whether its numbers have 16 bits, as the operands of cuBLASLt have.
    pub(super) fn is_16_bit(&self) -> bool {
        self.dtype != SPECACHE_FP32
    }

    /// Where a weight of 16-bit numbers ends.
    pub(super) fn end(&self) -> u64 {
        self.weight + u64::from(self.n) * u64::from(self.k) * 2
    }
}

/// One decoder layer. Norms are f32, 0 where there is none.
#[derive(Clone, Copy, Default)]
pub(crate) struct GpuLayer {
    pub input_norm: u64,
    pub q: Projection,
    pub k: Projection,
    pub v: Projection,
    pub q_norm: u64,
    pub k_norm: u64,
    pub o: Projection,
    pub post_norm: u64,
    pub gate: Projection,
    pub up: Projection,
    pub down: Projection,
}

/// Tensors begin at multiples of this, for 16-byte loads and whole memory sectors.
const ALIGN: usize = 256;

/// What goes where, before there is memory for it.
#[derive(Default)]
struct Layout<'a> {
    parts: Vec<(usize, &'a [u8])>,
    bytes: usize,
}

impl<'a> Layout<'a> {
    /// The offset of `bytes`, plus 1: 0 is nowhere.
    fn place(&mut self, bytes: &'a [u8]) -> u64 {
        let at = self.bytes;
        self.parts.push((at, bytes));
        self.bytes = (at + bytes.len()).next_multiple_of(ALIGN);
        at as u64 + 1
    }

    fn numbers(&mut self, numbers: Option<&'a Vec<f32>>) -> u64 {
        numbers.map_or(0, |n| self.place(cast_slice(n)))
    }

    fn matrix(&mut self, m: &'a Matrix) -> Projection {
        let (n, k) = (m.rows() as u32, m.cols() as u32);
        Projection { weight: self.place(m.bytes()), bias: 0, dtype: dtype_code(m.dtype()), n, k }
    }

    fn linear(&mut self, linear: &'a Linear) -> Projection {
        self.linears([linear])[0]
    }

    /// Matrices side by side, then their biases: where nothing has to be filled up between them, they are one matrix.
    fn linears<const N: usize>(&mut self, linears: [&'a Linear; N]) -> [Projection; N] {
        let mut placed = linears.map(|linear| self.matrix(&linear.weight));
        placed.iter_mut().zip(linears).for_each(|(p, linear)| p.bias = self.numbers(linear.bias.as_ref()));
        placed
    }
}

impl GpuModel {
    /// Copies a model to the device's GPU.
    ///
    /// # Errors
    /// [`Error::Usage`] for a shape that no kernel serves, [`Error::OutOfMemory`], [`Error::Device`].
    pub(crate) fn new(device: &Device, model: &Model, rope: &RopeTable) -> Result<GpuModel> {
        check_shape(model)?;
        let (weights, mut layout) = (&model.weights, Layout::default());
        let embed = layout.matrix(&weights.embed);
        let tied = weights.embed.bytes().as_ptr() == weights.lm_head.weight.bytes().as_ptr();
        let lm_head = if tied { embed } else { layout.linear(&weights.lm_head) };
        let (final_norm, inv_freq) =
            (layout.place(cast_slice(&weights.final_norm)), layout.place(cast_slice(&rope.inv_freq)));
        let mut layers: Vec<GpuLayer> = Vec::with_capacity(weights.layers.len());
        for layer in &weights.layers {
            let [q, k, v] = layout.linears([&layer.q, &layer.k, &layer.v]);
            let [gate, up] = layout.linears([&layer.gate, &layer.up]);
            layers.push(GpuLayer {
                input_norm: layout.place(cast_slice(&layer.input_norm)),
                q,
                k,
                v,
                q_norm: layout.numbers(layer.q_norm.as_ref()),
                k_norm: layout.numbers(layer.k_norm.as_ref()),
                o: layout.linear(&layer.o),
                post_norm: layout.place(cast_slice(&layer.post_norm)),
                gate,
                up,
                down: layout.linear(&layer.down),
            });
        }
        let mut memory = device
            .grant_for(Kind::Weights, layout.bytes as u64, 0, "a copy of the weights")?
            .device(layout.bytes, "a copy of the weights")?;
        layout.parts.iter().for_each(|(at, bytes)| memory.write(*at, bytes));
        device.sound()?;
        let base = memory.address();
        let path = device.options().linear;
        let cublas = open_cublas(device, model)?;
        let host_gather = start_host_gather(device)?;
        let suitable = || chunk_rows(&model.config, GpuTarget::here(device));
        let chunk_rows = device.options().prefill_rows.map_or_else(suitable, |rows| rows.max(1));
        let mut placed = GpuModel {
            _memory: memory,
            embed,
            layers,
            final_norm,
            lm_head,
            inv_freq,
            cublas,
            path,
            chunk_rows,
            host_gather,
        };
        placed.addresses().into_iter().filter(|at| **at != 0).for_each(|at| *at += base - 1);
        Ok(placed)
    }

    /// cuBLASLt, if it makes the products of so many rows. In a prefill these are a chunk's, so that nobody else's prompt
    /// has a say; in a decode step they are the batch's.
    pub(crate) fn cublas(&self, n_rows: usize) -> Option<&Cublas> {
        self.cublas.as_ref().filter(|_| self.path == LinearPath::Cublas || n_rows > LinearPath::AUTO_ROWS)
    }

    /// Every address, as [`Layout::place`] gave it.
    fn addresses(&mut self) -> Vec<&mut u64> {
        let GpuModel { embed, layers, final_norm, lm_head, inv_freq, .. } = self;
        let mut all = vec![final_norm, inv_freq];
        let mut projections = vec![embed, lm_head];
        for GpuLayer { input_norm, q, k, v, q_norm, k_norm, o, post_norm, gate, up, down } in layers {
            all.extend([input_norm, q_norm, k_norm, post_norm]);
            projections.extend([q, k, v, o, gate, up, down]);
        }
        for Projection { weight, bias, .. } in projections {
            all.extend([weight, bias]);
        }
        all
    }
}

/// cuBLASLt for a model, where the device's options want it.
///
/// # Errors
/// [`Error::Usage`] for fp32 weights, and as [`Cublas::open`]; with [`LinearPath::Auto`] neither: the fused kernels do
/// without.
fn open_cublas(device: &Device, model: &Model) -> Result<Option<Cublas>> {
    let gpu = device.gpu().expect("a model on a GPU");
    let is_fp32 = |linear: &Linear| linear.weight.dtype() == Dtype::F32;
    let has_fp32 = |layer: &Layer| {
        let Layer { q, k, v, o, gate, up, down, .. } = layer;
        [q, k, v, o, gate, up, down].into_iter().any(is_fp32)
    };
    match (device.options().linear, model.weights.layers.iter().position(has_fp32)) {
        (LinearPath::Fused, _) | (LinearPath::Auto, Some(_)) => Ok(None),
        (LinearPath::Cublas, Some(l)) => Err(Error::Usage(format!(
            "--linear cublas: layer {l} has fp32 weights, for which there are no 16-bit products; use --linear fused, or \
             convert the model"
        ))),
        (LinearPath::Cublas, None) => Cublas::open(device, gpu).map(Some),
        (LinearPath::Auto, None) => Ok(Cublas::open(device, gpu)
            .inspect_err(|why| notice::info(format_args!("the fused kernels compute all products: {why}")))
            .ok()),
    }
}

/// The thread that gathers for a GPU, where the device's options want it.
///
/// # Errors
/// As [`HostGather::new`]; with [`GatherWay::Auto`] none: the GPU gathers.
fn start_host_gather(device: &Device) -> Result<Option<Arc<HostGather>>> {
    let start = || HostGather::new(device).map(Arc::new);
    match device.options().gather {
        None | Some(GatherWay::Gpu) => Ok(None),
        Some(GatherWay::Cpu) => start().map(Some),
        Some(GatherWay::Auto) => {
            Ok(start().inspect_err(|why| notice::info(format_args!("the GPU gathers all pairs: {why}"))).ok())
        }
    }
}

/// What the kernels serve. Their plans refuse the rest too, but only once something runs.
///
/// # Errors
/// [`Error::Usage`] that names the number.
pub(crate) fn check_shape(model: &Model) -> Result<()> {
    let config = &model.config;
    let refuse = |what: String| Err(Error::Usage(format!("{what}; --device cpu serves this model")));
    if !matches!(config.head_dim, 64 | 128) {
        return refuse(format!("head_dim {}: the GPU kernels are made for 64 and 128", config.head_dim));
    }
    if config.group_heads() > 16 {
        return refuse(format!("{} query heads per KV head: the GPU kernels take up to 16", config.group_heads()));
    }
    for (name, width) in [("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)] {
        if width % 8 != 0 || width < 32 {
            return refuse(format!("{name} {width}: the GPU kernels need a multiple of 8, at least 32"));
        }
    }
    let dtype = |linear: &Linear| linear.weight.dtype();
    for (l, layer) in model.weights.layers.iter().enumerate() {
        if dtype(&layer.q) != dtype(&layer.k)
            || dtype(&layer.q) != dtype(&layer.v)
            || dtype(&layer.gate) != dtype(&layer.up)
        {
            return refuse(format!("layer {l}: the GPU kernels need q, k and v of one number type, and gate and up"));
        }
    }
    Ok(())
}
