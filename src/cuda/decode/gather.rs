//! Selected pairs on their way into the slots: read by the GPU's own multiprocessors, or gathered by threads of the host.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::graphs::GroupKey;
use super::{Group, Workspace};
use crate::cuda::host_gather::Letter;
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
    /// Of the batches that the memory has served: it is another one when their contexts have outgrown it.
    trials: Vec<Trial>,
    /// When the step that is timed began, and for which trial.
    timed: Option<(Instant, usize)>,
    /// Told what goes wrong with the letters of this pass.
    failure: Failure,
}

/// Steps of one batch, either way.
struct Trial {
    batch: Vec<GroupKey>,
    steps: usize,
    /// By the GPU, by the host.
    best: [Duration; 2],
}

impl Trial {
    fn new(batch: Vec<GroupKey>) -> Trial {
        Trial { batch, steps: 0, best: [Duration::MAX; 2] }
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
        let n = self.batch.last().map_or(0, |(seqs, ..)| seqs.end);
        let (way, s) = (if self.by_host() { "cpu" } else { "gpu" }, if n == 1 { "" } else { "s" });
        format!("--gather auto takes {way} for {n} sequence{s}: a step took {gpu:.2} ms by gpu, {host:.2} ms by cpu")
    }
}

impl Workspace {
    /// Decides who gathers in the pass that begins, by the device's options or by what steps of this batch have taken.
    /// `selects`: whether there is anything to fetch. `times`: whether the pass shows what a step takes.
    pub(super) fn choose_gather(&mut self, device: &Device, selects: bool, times: bool) {
        let batch = || self.groups.iter().map(Group::key).collect::<Vec<_>>();
        let Gatherer { by_host, trials, timed, failure } = &mut self.gatherer;
        (*timed, *failure) = (None, Failure::default());
        let may = self.memory.as_ref().is_some_and(|memory| memory.post.is_some());
        *by_host = match device.options().gather {
            _ if !selects || !may => false,
            None | Some(GatherWay::Gpu) => false,
            Some(GatherWay::Cpu) => true,
            Some(GatherWay::Auto) => {
                let batch = batch();
                let at = trials.iter().position(|trial| trial.batch == batch).or_else(|| {
                    times.then(|| trials.push(Trial::new(batch)))?;
                    Some(trials.len() - 1)
                });
                *timed = at.filter(|&at| times && !trials[at].is_over()).map(|at| (Instant::now(), at));
                at.is_some_and(|at| trials[at].by_host())
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
            let group = &self.groups[i];
            if group.mode != mode || group.top_k == 0 {
                continue;
            }
            let mut gathered = 0;
            // What the GPU is told after a failure it does not do: nobody is to wait for it.
            if self.gatherer.by_host && !gpu.driver().has_failed() && !self.has_given_up() {
                let hosts = group.seqs.clone().map(&pages);
                gathered = self.send_for(device, config, l, i, selects, hosts);
            }
            gpu.launch_on(StreamId::CopyIn, specache_fetch_plan, &self.fetch(config, l, &self.groups[i], gathered));
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

    /// The kernel that brings pairs into their slots, from the host's pages or from where they are `gathered`.
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

    /// The host expects a letter of group `i`, the GPU writes it, waits for the answer, and takes it. Returns where the pairs
    /// are then.
    fn send_for(
        &mut self,
        device: &Device,
        config: &Config,
        l: usize,
        i: usize,
        selects: StreamId,
        pages: impl Iterator<Item = Arc<HostLayer>>,
    ) -> u64 {
        let letter = self.letter(config, l, i, pages);
        let Letter { number, first, room, block, shape, .. } = letter;
        let mailbox = letter.mailbox.clone();
        let (gpu, memory) = (device.gpu().expect("a GPU's workspace"), self.memory());
        let (fetches, fetch_counts) = memory.fetches(config, &self.groups[i], l);
        let params = specache_post_params {
            seqs: memory.seqs(&self.groups[i]),
            fetches,
            fetch_counts,
            wanted: mailbox.wanted(first),
            bell: mailbox.bell(number),
            n_seqs: self.groups[i].n_seqs() as u32,
            n_kv_heads: config.n_kv_heads as u32,
            top_k: self.groups[i].top_k,
            reserved: 0,
        };
        memory.post.as_ref().expect("a host that may gather").gather.expect(letter);
        gpu.launch_on(selects, specache_post_plan, &params);
        device.after(StreamId::CopyIn, device.record(selects), "a letter is written before its pairs are waited for");
        let staged = memory.scratch.address() + memory.scratch_at.staged as u64;
        gpu.take(StreamId::CopyIn, &mailbox, number, block, staged, room * shape.pair_bytes());
        staged
    }

    /// What the host must know to answer group `i` in layer `l`.
    fn letter(&mut self, config: &Config, l: usize, i: usize, pages: impl Iterator<Item = Arc<HostLayer>>) -> Letter {
        let group = &self.groups[i];
        let memory = self.memory.as_mut().expect("reserved before the pass");
        let first = memory.first_list(config, l, group.seqs.start);
        let number = l * memory.sizes.seqs + group.seqs.start;
        let post = memory.post.as_mut().expect("a host that may gather");
        let block = post.sent % BLOCKS;
        post.sent += 1;
        let mut hosts = post.gather.spare();
        hosts.extend(pages);
        Letter {
            mailbox: post.mailbox.clone(),
            number,
            first,
            room: group.n_seqs() * config.n_kv_heads * group.top_k as usize,
            block,
            shape: group.shape,
            hosts,
            failure: self.gatherer.failure.clone(),
            place: Place::current(),
        }
    }

    /// The pass is over, for all that the compute queue knows. `failures` are those of earlier passes that it has read the
    /// pairs of.
    ///
    /// # Errors
    /// [`Error::Device`] with the first of them, or with this pass's own.
    pub(crate) fn end_pass(&mut self, failures: impl Iterator<Item = Failure>) -> Result<()> {
        if let Some((begun, at)) = self.gatherer.timed.take() {
            let trial = &mut self.gatherer.trials[at];
            trial.note(begun.elapsed());
            if trial.is_over() {
                notice::info(format_args!("{}", trial.describe()));
            }
        }
        let mut all = failures.chain([self.gatherer.failure.clone()]);
        let why = all.find_map(|failure| failure.get().cloned());
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

    fn has_given_up(&self) -> bool {
        self.memory().post.as_ref().is_some_and(|post| post.given_up)
    }

    /// Forgets what was tried with memory that there is no more.
    pub(super) fn forget_trials(&mut self) {
        self.gatherer.trials.clear();
    }

    /// Who is to be asked whether the pairs that this pass has sent for have come well.
    pub(crate) fn gather_failure(&self) -> Option<Failure> {
        self.gatherer.by_host.then(|| self.gatherer.failure.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The faster way wins if it is worth its cores, whatever the first steps of the GPU's take.
    #[test]
    fn a_trial_takes_the_faster_way() {
        let run = |gpu: [u64; TRIAL], host: [u64; TRIAL]| {
            let mut trial = Trial::new(vec![]);
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
            !by_host && words.contains("takes gpu for 0 sequences") && words.contains("5.00 ms by gpu, 4.90 ms"),
            "{words}"
        );
        assert!(run(fast, [4800; TRIAL]).0);
        assert!(!run([4000; TRIAL], fast).0);
    }
}
