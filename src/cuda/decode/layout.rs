//! What lies where in the memory of a decode pass, and how much of it there is.

use crate::cuda::dense::Between;
use crate::cuda::dtype_code;
use crate::cuda::parts::Parts;
use crate::cuda::rows::MAX_ROWS;
use crate::device::cuda::bindings::abi::{
    SPECACHE_ARGMAX_SLICE, specache_attn_params, specache_attn_part_bytes, specache_choice, specache_draw,
    specache_fetch, specache_layer_cache, specache_select_params, specache_select_scratch_bytes, specache_seq,
};
use crate::device::cuda::cublas::Cublas;
use crate::device::cuda::mailbox::MailboxSize;
use crate::device::{Device, LinearPath};
use crate::kv::plan::top_k;
use crate::kv::{KvOptions, KvShape};

use crate::model::Config;

use super::FUSED_GROUP;

/// What of a GPU decides how its work is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuTarget {
    /// Multiprocessors.
    pub n_sms: u32,
    /// The most shared memory that a block may ask for, bytes.
    pub shared_limit: u32,
    /// Compute capability.
    pub arch: (u32, u32),
    /// Whether the host may gather for it.
    pub host_gather: bool,
}

impl GpuTarget {
    /// A card that is not here, by its compute capability (CUDA C++ Programming Guide, "Technical Specifications per Compute
    /// Capability").
    pub fn of(n_sms: u32, arch: (u32, u32)) -> GpuTarget {
        let kib = match arch {
            (8, 0 | 7) => 163,
            (9..=11, _) => 227,
            _ => 99,
        };
        GpuTarget { n_sms, shared_limit: kib << 10, arch, host_gather: false }
    }

    pub(crate) fn here(device: &Device) -> GpuTarget {
        let facts = device.gpu().expect("a GPU's workspace").facts();
        let host_gather = device.options().host_may_gather();
        GpuTarget { n_sms: facts.gpu.n_sms, shared_limit: facts.shared_limit, arch: facts.gpu.arch, host_gather }
    }

    /// What cuBLASLt works in.
    pub(crate) fn cublas_bytes(self) -> u64 {
        Cublas::workspace_bytes(self.arch) as u64
    }
}

/// What decides the size of everything.
#[derive(Clone, Copy, Default, PartialEq)]
pub(super) struct Sizes {
    pub(super) rows: usize,
    /// Rows whose products cuBLASLt makes: all or none.
    pub(super) cublas_rows: usize,
    pub(super) seqs: usize,
    /// Sequences of the largest group.
    pub(super) group: usize,
    /// Tokens of the longest sequence, rounded up so that it changes rarely.
    pub(super) capacity: usize,
    pub(super) top_k: usize,
}

impl Sizes {
    /// Of a pass over `seqs` sequences with room for `room` tokens each.
    pub(super) fn new(rows: usize, seqs: usize, room: usize, top_k: usize, by_cublas: bool) -> Sizes {
        Sizes {
            rows,
            cublas_rows: if by_cublas { rows } else { 0 },
            seqs,
            group: if by_cublas { seqs } else { seqs.min(FUSED_GROUP) },
            capacity: room.next_multiple_of(1024),
            top_k,
        }
    }

    pub(super) fn covers(&self, other: &Sizes) -> bool {
        self.rows >= other.rows
            && self.seqs >= other.seqs
            && self.group >= other.group
            && self.cublas_rows >= other.cublas_rows
            && self.capacity >= other.capacity
            && self.top_k >= other.top_k
    }

    pub(super) fn max(&self, other: &Sizes) -> Sizes {
        Sizes {
            rows: self.rows.max(other.rows),
            seqs: self.seqs.max(other.seqs),
            group: self.group.max(other.group),
            cublas_rows: self.cublas_rows.max(other.cublas_rows),
            capacity: self.capacity.max(other.capacity),
            top_k: self.top_k.max(other.top_k),
        }
    }
}

/// Offsets in the block of memory that a pass works in.
#[derive(Clone, Copy, Default)]
pub(super) struct Scratch {
    pub(super) x: usize,
    pub(super) q: usize,
    pub(super) k: usize,
    pub(super) attn: usize,
    pub(super) inner: usize,
    pub(super) operand: usize,
    pub(super) products: usize,
    pub(super) rope: usize,
    pub(super) append: usize,
    pub(super) scores: usize,
    pub(super) lse: usize,
    pub(super) first_scores: usize,
    pub(super) first_lse: usize,
    pub(super) attn_parts: usize,
    pub(super) candidates: usize,
    pub(super) argmax: usize,
    pub(super) fetches: usize,
    pub(super) staged: usize,
    pub(super) bytes: usize,
}

/// Offsets in what the host tells the GPU before a pass; the same on both sides.
#[derive(Clone, Copy, Default)]
pub(super) struct Told {
    pub(super) tokens: usize,
    pub(super) seqs: usize,
    pub(super) caches: usize,
    /// End of what a pass is told.
    pub(super) pass: usize,
    /// One drawing at a time, behind the pass, and the tokens that its penalty applies to.
    pub(super) draw: usize,
    pub(super) seen: usize,
    pub(super) bytes: usize,
}

/// Offsets in what the GPU tells the host after a pass; the same on both sides.
#[derive(Clone, Copy, Default)]
pub(super) struct Results {
    pub(super) logits: usize,
    pub(super) drawn: usize,
    pub(super) choices: usize,
    pub(super) bad_layer: usize,
    pub(super) fetch_counts: usize,
    pub(super) select_counts: usize,
    pub(super) hits: usize,
    pub(super) selected: usize,
    pub(super) bytes: usize,
}

/// The parts of the attention's parameters that say how large everything is.
pub(super) fn attention_shape(
    target: GpuTarget,
    config: &Config,
    shape: &KvShape,
    n_seqs: usize,
    capacity: usize,
) -> specache_attn_params {
    specache_attn_params {
        score_stride: capacity as u64,
        n_seqs: n_seqs as u32,
        n_heads: config.n_heads as u32,
        n_kv_heads: config.n_kv_heads as u32,
        head_dim: config.head_dim as u32,
        bits: shape.packed.bits as u32,
        group_size: shape.packed.group_size as u32,
        dtype: dtype_code(shape.dtype),
        window: config.sliding_window.unwrap_or(0) as u32,
        capacity: capacity as u32,
        n_sms: target.n_sms,
        shared_limit: target.shared_limit,
        ..Default::default()
    }
}

impl Scratch {
    pub(super) fn new(target: GpuTarget, config: &Config, sizes: &Sizes) -> Scratch {
        let (mut parts, rows) = (Parts::default(), sizes.rows);
        let (heads, kv) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
        let shape = KvShape::new(config, &KvOptions::default());
        let attention = specache_attn_params {
            top_k: sizes.top_k as u32,
            ..attention_shape(target, config, &shape, sizes.group, sizes.capacity)
        };
        let selection = specache_select_params {
            n_seqs: sizes.group as u32,
            n_heads: attention.n_heads,
            n_kv_heads: attention.n_kv_heads,
            top_k: attention.top_k,
            capacity: attention.capacity,
            // Counting them takes twice the room; any address will do.
            hits: 1,
            ..Default::default()
        };
        let lists = config.n_layers * sizes.seqs * config.n_kv_heads * sizes.top_k;
        let slices = config.vocab_size.div_ceil(SPECACHE_ARGMAX_SLICE as usize);
        let score_rows = sizes.seqs * config.n_heads;
        let scores = if sizes.top_k > 0 { score_rows * sizes.capacity * 4 } else { 0 };
        Scratch {
            x: parts.next(rows * config.hidden_size * 4),
            q: parts.next(rows * heads * 4),
            k: parts.next(rows * kv * 4),
            attn: parts.next(rows * heads * 4),
            inner: parts.next(rows * config.intermediate_size * 4),
            operand: parts.next(sizes.cublas_rows * Between::operand_width(config) * 2),
            products: parts.next(sizes.cublas_rows * Between::product_width(config) * 4),
            rope: parts.next(rows * config.head_dim * 4),
            append: parts.next(config.n_layers * rows * 8),
            scores: parts.next(scores),
            lse: parts.next(score_rows * 4),
            first_scores: parts.next(scores),
            first_lse: parts.next(score_rows * 4),
            attn_parts: parts.next(part_bytes(&attention)),
            candidates: parts.next(candidate_bytes(&selection)),
            argmax: parts.next(MAX_ROWS * slices * size_of::<specache_choice>()),
            fetches: parts.next(lists * size_of::<specache_fetch>()),
            staged: parts.next(if target.host_gather { block_bytes(config, sizes) } else { 0 }),
            bytes: parts.bytes(),
        }
    }
}

/// Bytes of a block of gathered pairs: all pairs that a group may want of a layer.
fn block_bytes(config: &Config, sizes: &Sizes) -> usize {
    let pair_bytes = KvShape::new(config, &KvOptions::default()).pair_bytes();
    sizes.group * config.n_kv_heads * sizes.top_k * pair_bytes
}

/// Of the letters to the host: one for each layer and group, of which there are at most as many as sequences.
pub(super) fn mailbox_size(config: &Config, sizes: &Sizes) -> MailboxSize {
    let letters = config.n_layers * sizes.seqs;
    let pairs = letters * config.n_kv_heads * sizes.top_k;
    MailboxSize { letters, pairs, block_bytes: block_bytes(config, sizes) }
}

#[allow(unsafe_code)]
pub(super) fn part_bytes(params: &specache_attn_params) -> usize {
    // SAFETY: reads the struct.
    unsafe { specache_attn_part_bytes(params) as usize }
}

#[allow(unsafe_code)]
pub(super) fn candidate_bytes(params: &specache_select_params) -> usize {
    // SAFETY: reads the struct.
    unsafe { specache_select_scratch_bytes(params) as usize }
}

impl Told {
    pub(super) fn new(config: &Config, sizes: &Sizes) -> Told {
        let mut parts = Parts::default();
        Told {
            tokens: parts.next(sizes.rows * 4),
            seqs: parts.next(sizes.seqs * size_of::<specache_seq>()),
            caches: parts.next(sizes.seqs * config.n_layers * size_of::<specache_layer_cache>()),
            pass: parts.bytes(),
            draw: parts.next(size_of::<specache_draw>()),
            seen: parts.next(Told::seen_bytes(config.vocab_size)),
            bytes: parts.bytes(),
        }
    }

    /// A bit for each token, in words.
    pub(super) fn seen_bytes(vocab: usize) -> usize {
        vocab.div_ceil(32) * 4
    }
}

impl Results {
    pub(super) fn new(config: &Config, sizes: &Sizes) -> Results {
        let mut parts = Parts::default();
        let lists = config.n_layers * sizes.seqs * config.n_kv_heads;
        Results {
            logits: parts.next(sizes.rows * config.vocab_size * 4),
            drawn: parts.next(sizes.rows * 4),
            choices: parts.next(sizes.rows * size_of::<specache_choice>()),
            bad_layer: parts.next(sizes.rows * 4),
            fetch_counts: parts.next(lists * 4),
            select_counts: parts.next(lists * 4),
            hits: parts.next(lists * 4),
            selected: parts.next(lists * sizes.top_k * 4),
            bytes: parts.bytes(),
        }
    }
}

/// Bytes that decode passes over `batch` sequences of `context` tokens work in, beside the weights and caches: activations,
/// scores, parts of attention, lists, logits. Room is made for two rows a sequence in every mode.
pub(crate) fn workspace_bytes(
    target: GpuTarget,
    config: &Config,
    kv: &KvOptions,
    context: usize,
    batch: usize,
    has_cublas: bool,
) -> u64 {
    let (rows, top_k) = (2 * batch, if kv.mode.fetches() { top_k(kv, context) } else { 0 });
    let sizes = Sizes::new(rows, batch, context + 2, top_k, has_cublas && rows > LinearPath::AUTO_ROWS);
    let told = 2 * Told::new(config, &sizes).bytes;
    (Scratch::new(target, config, &sizes).bytes + told + Results::new(config, &sizes).bytes) as u64
}
