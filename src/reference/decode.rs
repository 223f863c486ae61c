//! A whole model over the ops: prefill, pre-decode and decode step of every mode, in the order of the method page.

use super::*;
use crate::kv::{KvMode, KvOptions};
use crate::model::{Config, Model};

/// What a teacher-forced run gives.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Run {
    /// `[len - prefill][vocab]`: the first row comes from the prompt's last position, one more from each fed token.
    pub logits: Vec<Vec<f32>>,
    /// The model's own speculative tokens `T'_2, ...`, one per decode step, also where other ones were forced
    /// (`specache` only).
    pub speculative: Vec<u32>,
    /// `[layer][kv head]`: positions that the pre-decode chose for the first step, ascending (`specache` only).
    pub pre_decode: Vec<Vec<Vec<u32>>>,
    /// `[step][layer][kv head]`: `specache`: the selection that this step made for the next one; `fetch`: the
    /// selection that this step used. Empty in other modes.
    pub steps: Vec<Vec<Vec<Vec<u32>>>>,
}

/// K and V of one (layer, KV head), all positions in both precisions; which one is read is the session's business.
#[derive(Default)]
struct HeadCache {
    /// `[n][head_dim]`, rounded to 16 bits.
    k: Vec<Vec<f32>>,
    /// `[n][head_dim]`, rounded to 16 bits.
    v: Vec<Vec<f32>>,
    /// `[n rounded down to pages][head_dim]`: quantised and back. Empty in modes without low-bit pages.
    low_k: Vec<Vec<f32>>,
    /// As `low_k`.
    low_v: Vec<Vec<f32>>,
}

impl HeadCache {
    /// Adds one token. A page is quantised as soon as it is full; [`Session::nq`] decides when it is read.
    fn append(&mut self, k: &[f32], v: &[f32], kv: &KvOptions) {
        self.k.push(k.to_vec());
        self.v.push(v.to_vec());
        let n = self.k.len();
        if kv.mode.low_bit() && n.is_multiple_of(PAGE) {
            let page = quantise_page(&self.k[n - PAGE..], &self.v[n - PAGE..], kv.bits, kv.group_size);
            let (k, v) = dequantise_page(&page);
            self.low_k.extend(k);
            self.low_v.extend(v);
        }
    }

    /// The mixed cache: low-bit below `nq` but for the positions `replaced` (ascending), 16-bit elsewhere.
    fn pairs(&self, nq: usize, replaced: &[u32]) -> Vec<Pair<'_>> {
        let pair = |position: usize| {
            let low = position < nq && replaced.binary_search(&(position as u32)).is_err();
            let (k, v) = if low { (&self.low_k, &self.low_v) } else { (&self.k, &self.v) };
            Pair { position, k: &k[position], v: &v[position] }
        };
        (0..self.k.len()).map(pair).collect()
    }
}

/// q, k and v of the rows that pass through a layer together; after RoPE, k and v rounded to 16 bits.
struct Qkv {
    /// `[rows][n_heads * head_dim]`
    q: Vec<Vec<f32>>,
    /// `[rows][n_kv_heads][head_dim]`
    k: Vec<Vec<Vec<f32>>>,
    /// `[rows][n_kv_heads][head_dim]`
    v: Vec<Vec<Vec<f32>>>,
}

/// One sequence.
pub struct Session<'a> {
    model: &'a Model,
    kv: KvOptions,
    /// `[layer][kv head]`
    cache: Vec<Vec<HeadCache>>,
    /// Tokens in the cache.
    pub n: usize,
    /// Tokens that are offloaded: candidates of a selection.
    pub no: usize,
    /// Tokens that attention reads low-bit (in modes that have low-bit pages).
    pub nq: usize,
    /// `[layer][kv head]`: `specache`: positions prefetched for the next step; `fetch`: those of the last step.
    pub selected: Vec<Vec<Vec<u32>>>,
}

impl<'a> Session<'a> {
    /// An empty sequence.
    pub fn new(model: &'a Model, kv: &KvOptions) -> Self {
        let config = &model.config;
        let per_head = || (0..config.n_kv_heads).map(|_| HeadCache::default()).collect();
        let cache = (0..config.n_layers).map(|_| per_head()).collect();
        Session { model, kv: *kv, cache, n: 0, no: 0, nq: 0, selected: nothing_selected(config) }
    }

    /// Prefill, first or continued: exact causal attention, then the counters. Gives the last row's logits `[vocab]`.
    ///
    /// A continued prefill of `kivi` reads its low-bit copy of `[0, nq)`: it has no other.
    pub fn prefill(&mut self, ids: &[u32]) -> Vec<f32> {
        let (model, kv, start) = (self.model, self.kv, self.n);
        let low_end = if kv.mode == KvMode::Kivi { self.nq } else { 0 };
        let hidden = forward(model, &kv, ids, start, |layer, rows| {
            let mut out = vec![Vec::new(); ids.len()];
            for (h, cache) in self.cache[layer].iter_mut().enumerate() {
                rows.k.iter().zip(&rows.v).for_each(|(k, v)| cache.append(&k[h], &v[h], &kv));
                let pairs = cache.pairs(low_end, &[]);
                for (r, out) in out.iter_mut().enumerate() {
                    // Causality is cut off here, not only masked, to halve the work.
                    out.extend(attend(&model.config, h, &rows.q[r], start + r, &pairs[..=start + r]).0);
                }
            }
            out
        });
        self.n += ids.len();
        self.no = self.no.max(self.n.saturating_sub(kv.residual_len) / PAGE * PAGE);
        self.nq = self.no;
        self.selected = nothing_selected(&model.config);
        logits(model, &hidden[ids.len() - 1])
    }

    /// Pre-decode of `T_1` (`specache`): chooses the prefetch of the first step and gives the logits whose argmax is
    /// `T'_2`. Appends nothing.
    pub fn pre_decode(&mut self, id: u32) -> Vec<f32> {
        let (model, kv, n) = (self.model, self.kv, self.n);
        let hidden = forward(model, &kv, &[id], n, |layer, rows| {
            let mut out = Vec::new();
            for (h, cache) in self.cache[layer].iter().enumerate() {
                let mut pairs = cache.pairs(self.nq, &[]);
                pairs.push(Pair { position: n, k: &rows.k[0][h], v: &rows.v[0][h] });
                let (row, mean) = attend(&model.config, h, &rows.q[0], n, &pairs);
                out.extend(row);
                self.selected[layer][h] = select(&model.config, &mean, n, self.no, kv.top_k);
            }
            vec![out]
        });
        logits(model, &hidden[0])
    }

    /// A decode step: feeds `id` and, in `specache`, the speculative token after it. Gives one row of logits `[vocab]`
    /// for each of them.
    pub fn step(&mut self, id: u32, speculative: Option<u32>) -> Vec<Vec<f32>> {
        let (model, kv, n) = (self.model, self.kv, self.n);
        let ids: Vec<u32> = [id].into_iter().chain(speculative).collect();
        let nq = if kv.mode.low_bit() { self.nq } else { 0 };
        let hidden = forward(model, &kv, &ids, n, |layer, rows| {
            let mut out = vec![Vec::new(); ids.len()];
            for (h, cache) in self.cache[layer].iter_mut().enumerate() {
                let own = |r: usize| Pair { position: n + r, k: &rows.k[r][h], v: &rows.v[r][h] };
                if kv.mode == KvMode::Fetch {
                    let mut pairs = cache.pairs(nq, &[]);
                    pairs.push(own(0));
                    let (_, mean) = attend(&model.config, h, &rows.q[0], n, &pairs);
                    self.selected[layer][h] = select(&model.config, &mean, n, nq, kv.top_k);
                }
                let mut pairs = cache.pairs(nq, &self.selected[layer][h]);
                // Row 0 stands before row 1, so the causal mask hides row 1 from it.
                pairs.extend((0..ids.len()).map(own));
                for (r, out) in out.iter_mut().enumerate() {
                    let (row, mean) = attend(&model.config, h, &rows.q[r], n + r, &pairs);
                    out.extend(row);
                    if r == 1 {
                        self.selected[layer][h] = select(&model.config, &mean, n + 1, self.no, kv.top_k);
                    }
                }
                cache.append(&rows.k[0][h], &rows.v[0][h], &kv);
            }
            out
        });
        // In this order: a page becomes low-bit one step after it was offloaded.
        self.nq = self.no;
        self.n += 1;
        if self.n - self.no >= kv.residual_len + PAGE {
            self.no += PAGE;
        }
        hidden.iter().map(|row| logits(model, row)).collect()
    }
}

/// Runs `ids` with the first `prefill` of them as the prompt and the others fed one by one, whatever the model says.
/// In `specache`, `forced_speculative` takes the place of the model's own `T'_2, ...`.
///
/// # Panics
/// Unless `1 <= prefill < ids.len()`, and unless there is a forced token for each of the `len - prefill - 1` steps.
pub fn teacher_forced(
    model: &Model,
    kv: &KvOptions,
    ids: &[u32],
    prefill: usize,
    forced_speculative: Option<&[u32]>,
) -> Run {
    assert!(1 <= prefill && prefill < ids.len(), "a prompt of {prefill} out of {} ids", ids.len());
    let speculates = kv.mode == KvMode::SpeCache;
    let mut session = Session::new(model, kv);
    let mut run = Run { logits: vec![session.prefill(&ids[..prefill])], ..Run::default() };
    let mut own = 0;
    if speculates {
        own = argmax(&session.pre_decode(ids[prefill]));
        run.pre_decode = session.selected.clone();
    }
    // The last id is only predicted, never fed.
    for (t, &id) in ids[prefill..ids.len() - 1].iter().enumerate() {
        let mut rows = session.step(id, speculates.then(|| forced_speculative.map_or(own, |forced| forced[t])));
        if speculates {
            run.speculative.push(own);
            own = argmax(&rows[1]);
        }
        if kv.mode.fetches() {
            run.steps.push(session.selected.clone());
        }
        run.logits.push(rows.swap_remove(0));
    }
    run
}

/// The `n` tokens that follow `prompt` greedily, with the model's own speculative tokens. Does not stop at an end token.
pub fn greedy(model: &Model, kv: &KvOptions, prompt: &[u32], n: usize) -> Vec<u32> {
    let mut session = Session::new(model, kv);
    let mut tokens = vec![argmax(&session.prefill(prompt))];
    let mut speculative = (kv.mode == KvMode::SpeCache).then(|| argmax(&session.pre_decode(tokens[0])));
    while tokens.len() < n {
        let rows = session.step(tokens[tokens.len() - 1], speculative);
        tokens.push(argmax(&rows[0]));
        speculative = rows.get(1).map(|row| argmax(row));
    }
    tokens.truncate(n);
    tokens
}

/// All layers for the tokens `ids` at positions `start ..`. `attention` gets a layer's number and its q, k, v and gives
/// the heads' outputs `[rows][n_heads * head_dim]`. The result is the residual stream after the last layer,
/// `[rows][hidden]`.
fn forward(
    model: &Model,
    kv: &KvOptions,
    ids: &[u32],
    start: usize,
    mut attention: impl FnMut(usize, &Qkv) -> Vec<Vec<f32>>,
) -> Vec<Vec<f32>> {
    let config = &model.config;
    let norm = |x: &[f32], weight: &[f32]| -> Vec<f32> {
        x.chunks_exact(weight.len()).flat_map(|row| rms_norm(row, weight, config.rms_norm_eps)).collect()
    };
    let rope: Vec<_> = (0..ids.len()).map(|r| rope_cos_sin(&config.rope, config.head_dim, start + r)).collect();
    let kv_dtype = kv.kv_dtype(config);
    let mut x: Vec<f32> = ids.iter().flat_map(|&id| embed(&model.weights.embed, id)).collect();
    for (l, layer) in model.weights.layers.iter().enumerate() {
        let normed = norm(&x, &layer.input_norm);
        let mut q = linear(&layer.q, &normed);
        let mut k = linear(&layer.k, &normed);
        let mut v = linear(&layer.v, &normed);
        for (heads, weight) in [(&mut q, &layer.q_norm), (&mut k, &layer.k_norm)] {
            if let Some(weight) = weight {
                *heads = norm(heads, weight);
            }
            let row_len = heads.len() / ids.len();
            for (row, (cos, sin)) in heads.chunks_exact_mut(row_len).zip(&rope) {
                row.chunks_exact_mut(config.head_dim).for_each(|head| rope_rotate(head, cos, sin));
            }
        }
        for x in k.iter_mut().chain(&mut v) {
            *x = round_kv(*x, kv_dtype);
        }
        let rows = |x: &[f32], width: usize| x.chunks_exact(width).map(<[f32]>::to_vec).collect::<Vec<_>>();
        let heads = |x: &[f32]| -> Vec<Vec<Vec<f32>>> {
            x.chunks_exact(config.n_kv_heads * config.head_dim).map(|row| rows(row, config.head_dim)).collect()
        };
        let qkv = Qkv { q: rows(&q, config.n_heads * config.head_dim), k: heads(&k), v: heads(&v) };
        add(&mut x, &linear(&layer.o, &attention(l, &qkv).concat()));

        let normed = norm(&x, &layer.post_norm);
        let mlp = silu_mul(&linear(&layer.gate, &normed), &linear(&layer.up, &normed));
        add(&mut x, &linear(&layer.down, &mlp));
    }
    x.chunks_exact(config.hidden_size).map(<[f32]>::to_vec).collect()
}

/// Final norm and LM head of one row `[hidden]`.
fn logits(model: &Model, hidden: &[f32]) -> Vec<f32> {
    linear(&model.weights.lm_head, &rms_norm(hidden, &model.weights.final_norm, model.config.rms_norm_eps))
}

/// Attention of the G query heads of KV head `kv_head`, cut out of the row `q` `[n_heads * head_dim]`: their outputs
/// `[G * head_dim]` and the mean of their probabilities, in the order of `pairs`.
fn attend(config: &Config, kv_head: usize, q: &[f32], position: usize, pairs: &[Pair]) -> (Vec<f32>, Vec<f32>) {
    let group_dim = config.group_heads() * config.head_dim;
    let group = &q[kv_head * group_dim..(kv_head + 1) * group_dim];
    let heads = group.chunks_exact(config.head_dim);
    let (out, probabilities): (Vec<_>, Vec<_>) =
        heads.map(|q| super::attention(q, position, pairs, config.sliding_window)).unzip();
    (out.concat(), mean_probabilities(&probabilities))
}

/// The `k` positions below `end` with the most attention among those that the row at `position` sees, ascending.
fn select(config: &Config, mean: &[f32], position: usize, end: usize, k: usize) -> Vec<u32> {
    let first = (0..end).find(|&j| sees(position, j, config.sliding_window)).unwrap_or(end);
    top_k(&mean[first..end], k).into_iter().map(|i| i + first as u32).collect()
}

/// No position in any layer and head.
fn nothing_selected(config: &Config) -> Vec<Vec<Vec<u32>>> {
    vec![vec![Vec::new(); config.n_kv_heads]; config.n_layers]
}

/// The residual connection: `x += y`.
fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
