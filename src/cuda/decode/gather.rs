//! Selected pairs on their way into the slots: read by the GPU's own multiprocessors, or gathered by threads of the host.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Group, Workspace};
use crate::cuda::host_gather::Letter;
use crate::device::cuda::Gpu;
use crate::device::cuda::bindings::abi::{
    specache_fetch_params, specache_fetch_plan, specache_post_params, specache_post_plan,
};
use crate::device::cuda::mailbox::{BLOCKS, Failure};
use crate::device::order::StreamId;
use crate::device::trace::Place;
use crate::device::{Device, Event, GatherWay};
use crate::error::{Error, Result};
use crate::kv::KvMode;
use crate::kv::host::HostLayer;
use crate::model::Config;
use crate::notice;

/// Steps that each way is tried for. Of the GPU's, whose steps become graphs, the first four are slower; the best counts.
const TRIAL: usize = 8;

/// What the host's way has to save of a step to be taken: it costs cores that others may want.
const WORTH: f64 = 0.03;

/// Who gathers.
#[derive(Default)]
pub(super) struct Gatherer {
    /// In this pass.
    by_host: bool,
    trials: Vec<Trial>,
    /// When the step that is timed began, and for which trial.
    timed: Option<(Instant, usize)>,
}

/// Steps with so many sequences, either way.
struct Trial {
    n_seqs: usize,
    steps: usize,
    /// By the GPU, by the host.
    best: [Duration; 2],
}

impl Trial {
    fn new(n_seqs: usize) -> Trial {
        Trial { n_seqs, steps: 0, best: [Duration::MAX; 2] }
    }

    fn is_over(&self) -> bool {
        self.steps == 2 * TRIAL
    }

    /// In the next step.
    fn by_host(&self) -> bool {
        if self.is_over() {
            let [gpu, host] = self.best.map(|best| best.as_secs_f64());
            return host < gpu * (1.0 - WORTH);
        }
        self.steps >= TRIAL
    }

    fn note(&mut self, took: Duration) {
        let best = &mut self.best[usize::from(self.by_host())];
        *best = took.min(*best);
        self.steps += 1;
    }

    fn describe(&self) -> String {
        let [gpu, host] = self.best.map(|best| best.as_secs_f64() * 1e3);
        let (way, s) = (if self.by_host() { "cpu" } else { "gpu" }, if self.n_seqs == 1 { "" } else { "s" });
        format!(
            "--gather auto takes {way} for {} sequence{s}: a step took {gpu:.2} ms by gpu, {host:.2} by cpu",
            self.n_seqs
        )
    }
}

impl Workspace {
    /// Decides who gathers in the pass that begins, by the device's options or by what steps like it have taken.
    pub(super) fn choose_gather(&mut self, device: &Device, n_seqs: usize) {
        let fetches = self.groups.iter().any(|group| group.mode.fetches() && group.top_k > 0);
        let Gatherer { by_host, trials, timed } = &mut self.gatherer;
        *timed = None;
        *by_host = match device.options().gather {
            _ if !fetches => false,
            None | Some(GatherWay::Gpu) => false,
            Some(GatherWay::Cpu) => true,
            Some(GatherWay::Auto) => {
                let at = trials.iter().position(|trial| trial.n_seqs == n_seqs).unwrap_or_else(|| {
                    trials.push(Trial::new(n_seqs));
                    trials.len() - 1
                });
                *timed = (!trials[at].is_over()).then(|| (Instant::now(), at));
                trials[at].by_host()
            }
        };
        let post = self.memory.as_mut().and_then(|memory| memory.post.as_mut());
        post.into_iter().for_each(|post| post.sent = 0);
    }

    /// Whether threads of the host gather in this pass.
    pub(crate) fn gathers_on_host(&self) -> bool {
        self.gatherer.by_host
    }

    /// The selected pairs of the sequences of one mode begin to come from the host. `selects`: the stream that has selected;
    /// `pages(i)`: the host's pages of sequence i in this layer. Returns when the pairs are there.
    pub(crate) fn gather(
        &mut self,
        device: &Device,
        config: &Config,
        l: usize,
        mode: KvMode,
        selects: StreamId,
        pages: impl Fn(usize) -> Arc<HostLayer>,
    ) -> Event {
        let gpu = device.gpu().expect("a GPU's workspace");
        for i in 0..self.groups.len() {
            if self.groups[i].mode != mode || self.groups[i].top_k == 0 {
                continue;
            }
            match self.gatherer.by_host {
                true => self.gather_on_host(device, gpu, config, l, i, selects, &pages),
                false => {
                    gpu.launch_on(StreamId::CopyIn, specache_fetch_plan, &self.fetch(config, l, &self.groups[i], 0))
                }
            }
        }
        if self.gatherer.by_host && gpu.driver().has_failed() {
            self.give_up(); // the GPU must wait for nothing that does not come
        }
        let event = device.record(StreamId::CopyIn);
        let memory = self.memory.as_mut().expect("reserved before the pass");
        memory.gathered[l] = Some(event);
        memory.told_read[memory.turn] = Some(event);
        event
    }

    fn fetch(&self, config: &Config, l: usize, group: &Group, gathered: u64) -> specache_fetch_params {
        let memory = self.memory();
        let (fetches, fetch_counts) = memory.fetches(config, group, l);
        specache_fetch_params {
            seqs: memory.seqs(group),
            caches: memory.caches(config.n_layers, group, l),
            fetches,
            fetch_counts,
            fetched: 0,
            gathered,
            n_seqs: group.n_seqs() as u32,
            n_kv_heads: config.n_kv_heads as u32,
            head_dim: config.head_dim as u32,
            top_k: group.top_k,
            n_ctas: 0,
            reserved: 0,
        }
    }

    /// The host is told of a letter, the GPU writes it, waits for the answer, and takes it.
    #[allow(clippy::too_many_arguments)] // One call site, which names them all.
    fn gather_on_host(
        &mut self,
        device: &Device,
        gpu: &Gpu,
        config: &Config,
        l: usize,
        group: usize,
        selects: StreamId,
        pages: &impl Fn(usize) -> Arc<HostLayer>,
    ) {
        let group = &self.groups[group];
        let memory = self.memory.as_mut().expect("reserved before the pass");
        let (first, number) =
            (memory.first_list(config, l, group.seqs.start), l * memory.sizes.seqs + group.seqs.start);
        let (fetches, fetch_counts) = memory.fetches(config, group, l);
        let seqs = memory.seqs(group);
        let block_bytes = super::layout::block_bytes(config, &memory.sizes);
        let staged_at = memory.scratch.address() + memory.scratch_at.staged as u64;
        let post = memory.post.as_mut().expect("a workspace of a device whose host may gather");
        let block = post.sent % BLOCKS;
        post.sent += 1;
        let staged = staged_at + (block * block_bytes) as u64;
        let mut hosts = post.gather.spare();
        hosts.extend(group.seqs.clone().map(pages));
        let mailbox = post.mailbox.clone();
        let params = specache_post_params {
            seqs,
            fetches,
            fetch_counts,
            wanted: mailbox.wanted(first),
            bell: mailbox.bell(number),
            n_seqs: group.n_seqs() as u32,
            n_kv_heads: config.n_kv_heads as u32,
            top_k: group.top_k,
            reserved: 0,
        };
        let flag = mailbox.flag(number);
        let room = group.n_seqs() * config.n_kv_heads * group.top_k as usize;
        let (shape, place) = (group.shape, Place::current());
        post.gather.expect(Letter { mailbox, number, first, room, block, staged, shape, hosts, place });
        gpu.launch_on(selects, specache_post_plan, &params);
        device.after(StreamId::CopyIn, device.record(selects), "a letter is written before its pairs are waited for");
        gpu.queues().await_flag(StreamId::CopyIn, flag);
        gpu.launch_on(StreamId::CopyIn, specache_fetch_plan, &self.fetch(config, l, group, staged));
        gpu.queues().lower_flag(StreamId::CopyIn, flag);
    }

    /// The pass is over, for all that the compute queue knows. `failure` are those of gathers that it has read the pairs of.
    ///
    /// # Errors
    /// [`Error::Device`] with the first of them.
    pub(crate) fn end_pass(&mut self, mut failures: impl Iterator<Item = Failure>) -> Result<()> {
        if let Some((begun, at)) = self.gatherer.timed.take() {
            let trial = &mut self.gatherer.trials[at];
            trial.note(begun.elapsed());
            if trial.is_over() {
                notice::info(format_args!("{}", trial.describe()));
            }
        }
        let why = failures.find_map(|failure| failure.get().cloned());
        why.map_or(Ok(()), |why| Err(Error::Device(format!("the gather for a GPU failed: {why}"))))
    }

    /// The pass has failed: nobody knows how far it has come. The next one takes other memory.
    pub(crate) fn give_up(&mut self) {
        self.gatherer.timed = None;
        if let Some(post) = self.memory.as_mut().and_then(|memory| memory.post.as_mut()) {
            post.gather.abandon(&post.mailbox);
            post.given_up = true;
        }
    }

    /// Who is to be asked whether the pairs that this pass has sent for have come well.
    pub(crate) fn gather_failure(&self) -> Option<Failure> {
        let post = self.memory().post.as_ref().filter(|_| self.gatherer.by_host)?;
        Some(post.mailbox.failure())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The faster way wins if it is worth its cores, whatever the first steps of the GPU's take.
    #[test]
    fn a_trial_takes_the_faster_way() {
        let run = |gpu: [u64; TRIAL], host: [u64; TRIAL]| {
            let mut trial = Trial::new(3);
            for (i, us) in gpu.into_iter().chain(host).enumerate() {
                assert_eq!((trial.is_over(), trial.by_host()), (false, i >= TRIAL));
                trial.note(Duration::from_micros(us));
            }
            assert!(trial.is_over());
            (trial.by_host(), trial.describe())
        };
        let fast = [9000, 8000, 5000, 5100, 5000, 5200, 5000, 5000];
        let (by_host, words) = run(fast, [4900; TRIAL]);
        assert!(
            !by_host && words.contains("takes gpu for 3 sequences") && words.contains("5.00 ms by gpu, 4.90"),
            "{words}"
        );
        assert!(run(fast, [4800; TRIAL]).0);
        assert!(!run([4000; TRIAL], fast).0);
    }
}
