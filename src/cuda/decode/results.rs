//! What the host learns of a decode pass, once it is over.

use super::layout::{Results, Told};
use super::memory::{Memory, mark_seen, put};
use super::{Group, Workspace};
use crate::device::cuda::bindings::abi::{
    SPECACHE_NONE, specache_choice, specache_draw, specache_draw_params, specache_draw_plan,
};
use crate::device::order::StreamId;
use crate::error::Result;
use crate::model::Config;
use crate::sampler::SamplingOptions;

impl Workspace {
    /// The logits of a row come to the host, once the pass is over, if they are not there.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(crate) fn fetch_logits(&mut self, row: usize) -> Result<()> {
        if self.logits_here[row] {
            return Ok(());
        }
        let (bytes, memory) = (self.vocab * 4, self.memory.as_mut().expect("reserved before the pass"));
        let at = memory.results_at.logits + row * bytes;
        let Memory { device, results, results_host, .. } = memory;
        let gpu = device.gpu().expect("a GPU's workspace");
        gpu.driver().begin_request();
        gpu.fetch(StreamId::Compute, results_host, at, results.address() + at as u64, bytes);
        device.finish(device.record(StreamId::Compute));
        device.sound()?;
        self.logits_here[row] = true;
        Ok(())
    }

    /// Logits `[vocab]` of a row, if they have come to the host.
    pub(crate) fn logits(&self, row: usize) -> Option<&[f32]> {
        let first = row * self.vocab;
        self.logits_here[row].then(|| &self.memory().told_back(|r| r.logits)[first..first + self.vocab])
    }

    /// The token of a row that is drawn with `options` and a random number in [0, 1), once the pass is over.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(crate) fn draw(&mut self, row: usize, options: &SamplingOptions, random: f64, history: &[u32]) -> Result<u32> {
        let (vocab, memory) = (self.vocab, self.memory.as_mut().expect("reserved before the pass"));
        let Told { draw, seen, .. } = memory.told_at;
        let penalises = options.repeat_penalty != 1.0;
        let request = specache_draw {
            seen: if penalises { memory.told() + seen as u64 } else { 0 },
            // Whole: the product is below 2^64, and has the 53 bits of the number.
            random: (random * 2f64.powi(64)) as u64,
            row: row as u32,
            // More than there are is all of them.
            top_k: options.top_k.min(vocab) as u32,
            temperature: options.temperature,
            top_p: options.top_p,
            min_p: options.min_p,
            penalty: options.repeat_penalty,
        };
        let params = specache_draw_params {
            draws: memory.told() + draw as u64,
            logits: memory.result(memory.results_at.logits, 0),
            choices: memory.result(memory.results_at.choices, 0),
            tokens: memory.result(memory.results_at.drawn, 0),
            n_draws: 1,
            vocab: vocab as u32,
        };
        let told = memory.told();
        let Memory { device, told_host, results, results_host, results_at, .. } = memory;
        let gpu = device.gpu().expect("a GPU's workspace");
        gpu.driver().begin_request();
        put(told_host.bytes_mut(), draw, &request);
        gpu.send(StreamId::Compute, told + draw as u64, told_host, draw..draw + size_of::<specache_draw>());
        if penalises {
            let bytes = seen..seen + Told::seen_bytes(vocab);
            mark_seen(&mut told_host.bytes_mut()[bytes.clone()], history, vocab);
            gpu.send(StreamId::Compute, told + seen as u64, told_host, bytes);
        }
        gpu.launch(specache_draw_plan, &params);
        let at = results_at.drawn + row * 4;
        gpu.fetch(StreamId::Compute, results_host, at, results.address() + at as u64, 4);
        device.finish(device.record(StreamId::Compute));
        device.sound()?;
        Ok(memory.told_back(|r| r.drawn)[row])
    }

    /// The token of a row's highest logit, once the pass is over.
    pub(crate) fn argmax(&self, row: usize) -> u32 {
        self.choice(row).token
    }

    /// Whether all logits of a row are numbers, once the pass is over.
    pub(crate) fn is_finite(&self, row: usize) -> bool {
        let choice = self.choice(row);
        choice.first_bad == SPECACHE_NONE && choice.logit.is_finite()
    }

    fn choice(&self, row: usize) -> specache_choice {
        self.memory().told_back(|r| r.choices)[row]
    }

    /// First layer whose input was not finite in the real row of sequence `seq`, once the pass is over.
    pub(crate) fn bad_layer(&self, seq: usize) -> Option<usize> {
        let row = self.real_rows[seq];
        let layer: u32 = self.memory().told_back(|r| r.bad_layer)[row];
        (layer != SPECACHE_NONE).then_some(layer as usize)
    }

    /// Pairs that sequence `seq` fetched in layer `l`, once the pass is over.
    pub(crate) fn fetched(&self, config: &Config, l: usize, seq: usize) -> u64 {
        self.sum_of_heads(config, l, seq, |r| r.fetch_counts)
    }

    /// Pairs of row 0's own top-k that sequence `seq` had prefetched in layer `l`, once a `specache` step is over.
    pub(crate) fn hits(&self, config: &Config, l: usize, seq: usize) -> u64 {
        self.sum_of_heads(config, l, seq, |r| r.hits)
    }

    fn group_of(&self, seq: usize) -> &Group {
        self.groups.iter().find(|group| group.seqs.contains(&seq)).expect("a sequence of the pass")
    }

    fn sum_of_heads(&self, config: &Config, l: usize, seq: usize, part: impl FnOnce(&Results) -> usize) -> u64 {
        let (memory, heads) = (self.memory(), config.n_kv_heads);
        if self.group_of(seq).top_k == 0 {
            // A sequence so short that it selects nothing: no kernel has counted.
            return 0;
        }
        let counts: &[u32] = memory.told_back(part);
        counts[(l * memory.sizes.seqs + seq) * heads..][..heads].iter().map(|&n| u64::from(n)).sum()
    }

    /// Positions that sequence `seq` selected for a KV head in layer `l`, once the pass is over.
    pub(crate) fn selected(&self, config: &Config, l: usize, seq: usize, head: usize) -> &[u32] {
        let (memory, group) = (self.memory(), self.group_of(seq));
        if group.top_k == 0 {
            return &[];
        }
        let at = (l * memory.sizes.seqs + seq) * config.n_kv_heads + head;
        let count: u32 = memory.told_back(|r| r.select_counts)[at];
        // Lists of a group are as long as its own top-k.
        let first = memory.first_list(config, l, group.seqs.start);
        let list = first + ((seq - group.seqs.start) * config.n_kv_heads + head) * group.top_k as usize;
        &memory.told_back(|r| r.selected)[list..][..count as usize]
    }
}
