//! `bench --overlap`: how much of the copies each schedule hides, layer by layer, and what the simulation says of the same
//! costs.

use std::time::Instant;

use specache::device::interrupt;
use specache::device::order::StreamId;
use specache::device::trace::Slice;
use specache::error::{Error, Result};
use specache::kv::{KvMode, KvOptions};
use specache::sampler::argmax;
use specache::sim::{Costs, Schedule};
use specache::{Buffers, Engine, Next, Session};

use super::models::{self, Fill};
use super::timeline::{Panel, svg};
use super::{SEED, prefill};
use crate::cli::args::BenchArgs;
use crate::cli::output::{AtomicFile, print, table};
use crate::cli::progress::Progress;
use crate::cli::size;

/// Steps that are not measured: the pre-decode is in the first, and all buffers have grown after some.
const WARM_UP: usize = 3;

/// Runs one model under all schedules in turns, and prints what was hidden.
///
/// # Errors
/// Whatever is wrong with the arguments or the model, or with the file of the picture.
pub fn run(args: &BenchArgs) -> Result<()> {
    let model = match &args.model[..] {
        [] => models::synthetic().to_string(),
        [model] => model.clone(),
        _ => return Err(Error::Usage("--overlap: one model at a time; give one with -m".into())),
    };
    let kv = args.tuning.options(KvMode::SpeCache);
    let plot = args.plot.as_deref().map(AtomicFile::create).transpose()?;
    let trace = args.device.trace_file()?;
    let mut progress = Progress::new();
    progress.show(format_args!("loading {model}"));
    let mut options = args.device.options()?;
    options.trace = true;
    let engine = Engine::load(&model, &options)?;
    let _ctrl_c = interrupt::forward(engine.interrupt_flag());
    let n = args.n_predict.unwrap_or(if engine.model().weights.bytes(true) < 1_000_000_000 { 64 } else { 6 });
    let fill = models::fill(&engine, &model, args.depth)?;
    let mut bench = Bench::new(&engine, kv, args.batch, &fill, WARM_UP + n * args.repetitions * 3, &mut progress)?;
    for repetition in 1..=args.repetitions {
        for schedule in Schedule::ALL {
            progress.show(format_args!("repetition {repetition} of {}, {}", args.repetitions, schedule.name()));
            engine.device().set_pipeline(schedule);
            for _ in 0..n {
                bench.step(Some(schedule))?;
            }
        }
    }
    progress.clear();
    let title = format!(
        "{}: {} tokens in the cache, batch {}, {} steps a schedule in turns, {}",
        engine.model().name,
        fill.depth(),
        args.batch,
        n * args.repetitions,
        engine.device().describe()
    );
    report(&title, &bench)?;
    if let Some(mut file) = plot {
        file.write(svg(&title, &bench.panels()).as_bytes())?;
        file.commit()?;
    }
    if let Some(mut file) = trace {
        let mut text = Vec::new();
        specache::device::trace::write_chrome(&bench.slices, &mut text).expect("memory takes everything");
        file.write(&text)?;
        file.commit()?;
    }
    Ok(())
}

/// One step as it was.
struct StepRun {
    schedule: Schedule,
    us: f64,
    /// Its slices among all.
    slices: std::ops::Range<usize>,
}

struct Bench<'a> {
    engine: &'a Engine,
    sessions: Vec<Session>,
    tokens: Vec<u32>,
    buffers: Buffers,
    steps: Vec<StepRun>,
    slices: Vec<Slice>,
}

impl<'a> Bench<'a> {
    fn new(
        engine: &'a Engine,
        kv: KvOptions,
        batch: usize,
        fill: &Fill,
        steps: usize,
        progress: &mut Progress,
    ) -> Result<Bench<'a>> {
        let mut bench = Bench {
            engine,
            sessions: Vec::new(),
            tokens: Vec::new(),
            buffers: Buffers::default(),
            steps: Vec::new(),
            slices: Vec::new(),
        };
        // All of them or none: what the first ones have been granted shows in free memory only when it is written.
        let capacity = fill.depth().saturating_add(steps).saturating_add(1);
        let plan = engine.plan(&kv, capacity)?;
        let all = |bytes: u64| bytes.saturating_mul(batch as u64);
        let what = format!("{batch} KV caches of {capacity} tokens");
        drop(engine.device().grant(all(plan.device()), all(plan.host), &what)?);
        for i in 0..batch {
            progress.show(format_args!("{} tokens into cache {} of {batch}", fill.depth(), i + 1));
            let mut session = engine.session(kv, fill.depth() + steps + 1)?;
            let token = match fill {
                Fill::Random { tokens, first } => {
                    engine.device().run(|| session.fill_synthetic(*tokens, SEED + i as u64))?;
                    *first
                }
                Fill::Prompt(tokens) => argmax(&prefill(engine, &mut session, tokens, &mut bench.buffers)?.0),
            };
            bench.sessions.push(session);
            bench.tokens.push(token);
        }
        for _ in 0..WARM_UP {
            bench.step(None)?;
        }
        Ok(bench)
    }

    fn step(&mut self, schedule: Option<Schedule>) -> Result<()> {
        let trace = self.engine.device().trace().expect("the device keeps one");
        let begin = Instant::now();
        let next = self.sessions.iter_mut().zip(&self.tokens).map(|(session, &token)| Next { session, token });
        self.engine.decode(&mut next.collect::<Vec<_>>(), &mut self.buffers)?;
        let us = begin.elapsed().as_secs_f64() * 1e6;
        for (i, token) in self.tokens.iter_mut().enumerate() {
            *token = argmax(self.buffers.logits(i)?);
        }
        let (first, new) = (self.slices.len(), trace.take());
        if let Some(schedule) = schedule {
            self.slices.extend(new);
            self.steps.push(StepRun { schedule, us, slices: first..self.slices.len() });
        }
        Ok(())
    }

    /// Steps of a schedule, without the first of each turn: that one still meets what another schedule has launched.
    fn steps(&self, schedule: Schedule) -> impl Iterator<Item = &StepRun> {
        let steps = self.steps.windows(2).filter(|pair| pair[0].schedule == pair[1].schedule).map(|pair| &pair[1]);
        let steps: Vec<_> = steps.filter(|step| step.schedule == schedule).collect();
        let all = self.steps.iter().filter(|step| step.schedule == schedule);
        // With one step a turn there is nothing else.
        if steps.is_empty() { all.collect::<Vec<_>>() } else { steps }.into_iter()
    }

    /// Means over the steps of a schedule, a layer each.
    fn layers(&self, schedule: Schedule) -> Vec<LayerRun> {
        let mut layers = vec![LayerRun::default(); self.engine.model().config.n_layers];
        let mut count = 0.0;
        for step in self.steps(schedule) {
            count += 1.0;
            for slice in &self.slices[step.slices.clone()] {
                if let Some(layer) = slice.place.layer {
                    layers[layer as usize].add(slice);
                }
            }
        }
        layers.iter_mut().for_each(|layer| layer.divide(count));
        layers
    }

    fn head_us(&self, schedule: Schedule) -> f64 {
        let of_step = |step: &StepRun| -> f64 {
            let slices = self.slices[step.slices.clone()].iter();
            slices.filter(|s| s.stream == StreamId::Compute && s.place.layer.is_none()).map(Slice::us).sum()
        };
        mean(self.steps(schedule).map(of_step))
    }

    fn exposed_us(&self, schedule: Schedule) -> f64 {
        let of_step = |step: &StepRun| -> f64 {
            self.slices[step.slices.clone()].iter().filter(|slice| slice.waits).map(Slice::us).fold(0.0, |a, b| a + b)
        };
        mean(self.steps(schedule).map(of_step))
    }

    /// What the simulation needs, as it was measured under `event`.
    fn costs(&self) -> Costs {
        let layers = self.layers(Schedule::Event);
        let sum = |of: fn(&LayerRun) -> f64| layers.iter().map(of).sum::<f64>();
        let per_layer = |of| sum(of) / layers.len() as f64;
        let bytes = sum(|l| l.bytes);
        let rate = |us: f64| if us > 0.0 { bytes / us } else { f64::INFINITY };
        Costs {
            n_layers: layers.len(),
            attention_us: per_layer(|l| l.attention_us),
            rest_us: per_layer(|l| l.rest_us),
            head_us: self.head_us(Schedule::Event),
            fetch_bytes: bytes / layers.len() as f64,
            sequences: self.sessions.len(),
            copy_latency_us: 0.0,
            gather_bytes_per_us: rate(sum(|l| l.gather_us)),
            link_bytes_per_us: rate(sum(|l| l.copy_us)),
        }
    }

    /// The step of median length of each schedule.
    fn panels(&self) -> Vec<Panel> {
        let panel = |schedule: Schedule| {
            let mut steps: Vec<_> = self.steps(schedule).collect();
            steps.sort_by(|a, b| a.us.total_cmp(&b.us));
            let step = steps.get(steps.len() / 2)?;
            let compute = |slice: &&Slice| slice.stream == StreamId::Compute;
            let own = || self.slices[step.slices.clone()].iter().filter(compute);
            let begin_us = own().map(|s| s.begin_us).fold(f64::INFINITY, f64::min);
            let end_us = own().map(|s| s.end_us).fold(0.0, f64::max);
            let overlaps = |s: &&Slice| s.node.is_none() && s.end_us > begin_us && s.begin_us < end_us;
            let title = format!(
                "{}: this step, of median length, took {:.2} ms and waited {:.2} ms of it for copies",
                schedule.name(),
                (end_us - begin_us) / 1e3,
                own().filter(|s| s.waits).map(Slice::us).fold(0.0, |a, b| a + b) / 1e3
            );
            let slices = self.slices.iter().filter(overlaps).copied().collect();
            Some(Panel { title, slices, begin_us, end_us })
        };
        Schedule::ALL.into_iter().filter_map(panel).collect()
    }
}

/// Means of one layer.
#[derive(Clone, Default)]
struct LayerRun {
    attention_us: f64,
    rest_us: f64,
    gather_us: f64,
    copy_us: f64,
    bytes: f64,
    exposed_us: f64,
}

impl LayerRun {
    fn add(&mut self, slice: &Slice) {
        let sum = match (slice.stream, slice.name) {
            _ if slice.node.is_some() => return, // a part of a gather that is counted
            (StreamId::Compute, _) if slice.waits => &mut self.exposed_us,
            (StreamId::Compute, "out_residual" | "norm_gate_up" | "down_residual") => &mut self.rest_us,
            (StreamId::Compute, _) => &mut self.attention_us,
            (StreamId::Gather, _) => &mut self.gather_us,
            (StreamId::CopyIn, _) => {
                self.bytes += slice.bytes as f64;
                &mut self.copy_us
            }
            (StreamId::CopyOut, _) => return,
        };
        *sum += slice.us();
    }

    fn divide(&mut self, count: f64) {
        let LayerRun { attention_us, rest_us, gather_us, copy_us, bytes, exposed_us } = self;
        [attention_us, rest_us, gather_us, copy_us, bytes, exposed_us].into_iter().for_each(|x| *x /= count);
    }
}

fn mean(xs: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = xs.fold((0.0, 0.0), |(sum, n), x| (sum + x, n + 1.0));
    sum / n
}

fn report(title: &str, bench: &Bench) -> Result<()> {
    let costs = bench.costs();
    let rows = Schedule::ALL.map(|schedule| {
        let us = mean(bench.steps(schedule).map(|step| step.us));
        let (exposed, simulated) = (bench.exposed_us(schedule), costs.simulate(schedule));
        vec![
            schedule.name().to_string(),
            format!("{:.3}", us / 1e3),
            format!("{exposed:.1}"),
            format!("{:.2} %", 100.0 * exposed / us),
            format!("{:.3}", simulated.step_us / 1e3),
            format!("{:.1}", simulated.exposed_us),
        ]
    });
    let header = ["schedule", "ms a step", "exposed us", "of the step", "simulated ms", "simulated exposed us"];
    print(&format!("## {title}\n\n{}", table(&header, &rows)))?;
    print(&format!(
        "\nsimulated: the same schedules, deterministically, with the mean costs measured under event (a step without waits: \
         {:.3} ms). On a busy machine steps take longer than their parts, and the two differ.\n\nevent, layer by layer: means of a step, us\n\n",
        costs.compute_us() / 1e3
    ))?;
    let rows: Vec<_> = bench.layers(Schedule::Event).into_iter().enumerate().map(layer_row).collect();
    print(&table(&["layer", "attention", "rest", "gather", "copy", "fetched", "exposed"], &rows))?;
    let saved = bench.sessions.iter().filter_map(|session| session.stats().saved()).fold(0.0, |a, b| a + b);
    if bench.engine.device().options().delta {
        print(&format!(
            "\n{:.1} % of the selected pairs were in their slots already.\n",
            100.0 * saved / bench.sessions.len() as f64
        ))?;
    }
    Ok(())
}

fn layer_row((layer, run): (usize, LayerRun)) -> Vec<String> {
    let us = |x: f64| format!("{x:.1}");
    vec![
        layer.to_string(),
        us(run.attention_us),
        us(run.rest_us),
        us(run.gather_us),
        us(run.copy_us),
        size::show(run.bytes as u64),
        us(run.exposed_us),
    ]
}
