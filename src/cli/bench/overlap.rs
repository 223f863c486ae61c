//! `bench --overlap`: how much of the copies each schedule hides, layer by layer, and what the simulation says of the same
//! costs.

use std::time::Instant;

use specache::device::interrupt;
use specache::device::order::StreamId;
use specache::device::trace::{Slice, Trace};
use specache::error::{Error, Result};
use specache::kv::{KvMode, KvOptions};
use specache::sampler::argmax;
use specache::sim::{Costs, Schedule};
use specache::{Buffers, Engine, Next, Session};

use super::models::{self, Fill};
use super::timeline::{Kind, Panel, svg};
use super::{SEED, prefill};
use crate::cli::args::BenchArgs;
use crate::cli::output::{AtomicFile, print, table, traced};
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
    let plot = args.plot.as_deref().map(|file| AtomicFile::create("--plot", file)).transpose()?;
    let trace = args.device.trace_file()?;
    let mut progress = Progress::new();
    progress.announce(format_args!("loading {model}"));
    let mut options = args.device.options()?;
    options.trace = true;
    let engine = Engine::load(&model, &options)?;
    let _ctrl_c = interrupt::forward(engine.interrupt_flag());
    let n = args.n_predict.unwrap_or(if engine.model().weights.bytes(true) < 1_000_000_000 { 64 } else { 6 });
    let fill = models::fill(&engine, &model, args.depth.first().copied(), 0)?;
    let mut bench = Bench::new(&engine);
    let outcome = bench.run(kv, args, &fill, n, &mut progress);
    progress.clear();
    traced(trace, engine.device(), bench.slices.clone(), outcome)?;
    let title = format!(
        "{}: {} tokens in the cache, batch {}, {} steps a schedule in turns, {}",
        engine.model().name,
        fill.depth(),
        args.batch[0],
        n * args.repetitions,
        engine.device().describe()
    );
    // Each comes also where the other fails: a disk may be full, a reader may have gone away.
    let told = report(&title, &bench);
    let Some(mut file) = plot else { return told };
    file.write(svg(&title, &bench.panels()).as_bytes())?;
    file.commit().and(told)
}

/// One step as it was.
struct StepRun {
    schedule: Schedule,
    us: f64,
    /// The device's number of the step, which is in the place of each slice that it launched.
    number: u32,
}

struct Bench<'a> {
    engine: &'a Engine,
    sessions: Vec<Session>,
    tokens: Vec<u32>,
    buffers: Buffers,
    steps: Vec<StepRun>,
    /// Of all measured steps, and what the warm-up's last one has left over; after a whole run in the order of steps.
    slices: Vec<Slice>,
}

impl<'a> Bench<'a> {
    fn new(engine: &'a Engine) -> Bench<'a> {
        Bench {
            engine,
            sessions: Vec::new(),
            tokens: Vec::new(),
            buffers: Buffers::default(),
            steps: Vec::new(),
            slices: Vec::new(),
        }
    }

    /// All schedules in turns, `n` steps a turn.
    fn run(&mut self, kv: KvOptions, args: &BenchArgs, fill: &Fill, n: usize, progress: &mut Progress) -> Result<()> {
        self.fill(kv, args.batch[0], fill, WARM_UP + n * args.repetitions * Schedule::ALL.len(), progress)?;
        for _ in 0..WARM_UP {
            self.step(None)?;
        }
        for repetition in 1..=args.repetitions {
            for schedule in Schedule::ALL {
                progress.show(format_args!("repetition {repetition} of {}, {}", args.repetitions, schedule.name()));
                self.engine.device().set_pipeline(schedule);
                for _ in 0..n {
                    self.step(Some(schedule))?;
                }
            }
        }
        // What the last step has launched belongs to it, as it does to every other.
        self.engine.device().finish_trace();
        self.slices.extend(self.trace().take());
        self.slices.sort_by_key(|slice| slice.place.step);
        Ok(())
    }

    /// Sessions with full caches and room for so many steps.
    fn fill(&mut self, kv: KvOptions, batch: usize, fill: &Fill, steps: usize, progress: &mut Progress) -> Result<()> {
        let engine = self.engine;
        // All of them or none: what the first ones have been granted shows in free memory only when it is written.
        let capacity = fill.depth().saturating_add(steps).saturating_add(1);
        let plan = engine.plan(&kv, capacity)?;
        let all = |bytes: u64| bytes.saturating_mul(batch as u64);
        let what = format!(
            "a batch of {batch} KV caches of {capacity} tokens each (-b, -d, and {steps} steps from -n and -r)"
        );
        drop(engine.device().grant(all(plan.device()), all(plan.host), &what)?);
        for i in 0..batch {
            progress.show(format_args!("{} tokens into cache {} of {batch}", fill.depth(), i + 1));
            let mut session = engine.session(kv, capacity)?;
            let token = match fill {
                Fill::Random { tokens, first } => {
                    engine.device().run(|| session.fill_synthetic(*tokens, SEED + i as u64))?;
                    *first
                }
                Fill::Prompt { tokens, .. } => argmax(&prefill(engine, &mut session, tokens, &mut self.buffers)?.0),
            };
            self.sessions.push(session);
            self.tokens.push(token);
        }
        Ok(())
    }

    fn trace(&self) -> &'a Trace {
        self.engine.device().trace().expect("the device keeps one")
    }

    fn step(&mut self, schedule: Option<Schedule>) -> Result<()> {
        let begin = Instant::now();
        let next = self.sessions.iter_mut().zip(&self.tokens).map(|(session, &token)| Next { session, token });
        self.engine.decode(&mut next.collect::<Vec<_>>(), &mut self.buffers)?;
        let us = begin.elapsed().as_secs_f64() * 1e6;
        for (i, token) in self.tokens.iter_mut().enumerate() {
            *token = self.buffers.argmax(i)?;
        }
        let new = self.trace().take();
        let own = new.iter().filter(|slice| slice.stream == StreamId::Compute);
        let number = own.map(|slice| slice.place.step).max();
        let number = number.ok_or_else(|| Error::Device("nothing of a step was timed".into()))?;
        if let Some(schedule) = schedule {
            self.slices.extend(new);
            self.steps.push(StepRun { schedule, us, number });
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

    /// What a step computed, waited for and launched, whenever that ended.
    fn slices_of(&self, step: &StepRun) -> impl Iterator<Item = &Slice> {
        let of = |number| self.slices.partition_point(|slice| slice.place.step < number);
        self.slices[of(step.number)..of(step.number + 1)].iter()
    }

    /// Means over the steps of a schedule, a layer each.
    fn layers(&self, schedule: Schedule) -> Vec<LayerRun> {
        let mut layers = vec![LayerRun::default(); self.engine.model().config.n_layers];
        let mut count = 0.0;
        for step in self.steps(schedule) {
            count += 1.0;
            for slice in self.slices_of(step) {
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
            let slices = self.slices_of(step);
            slices.filter(|s| s.stream == StreamId::Compute && s.place.layer.is_none()).map(Slice::us).sum()
        };
        mean(self.steps(schedule).map(of_step))
    }

    fn exposed_us(&self, schedule: Schedule) -> f64 {
        let of_step = |step: &StepRun| -> f64 {
            self.slices_of(step).filter(|slice| slice.waits).map(Slice::us).fold(0.0, |a, b| a + b)
        };
        mean(self.steps(schedule).map(of_step))
    }

    /// What the simulation needs, as it was measured under `event`.
    fn costs(&self) -> Costs {
        let layers = self.layers(Schedule::Event);
        let sum = |kind: Kind| layers.iter().map(|layer| layer.of(kind)).sum::<f64>();
        let per_layer = |kind| sum(kind) / layers.len() as f64;
        let bytes = layers.iter().map(|layer| layer.bytes).sum::<f64>();
        let rate = |us: f64| if us > 0.0 { bytes / us } else { f64::INFINITY };
        Costs {
            n_layers: layers.len(),
            attention_us: per_layer(Kind::Attention),
            rest_us: per_layer(Kind::Dense),
            head_us: self.head_us(Schedule::Event),
            fetch_bytes: bytes / layers.len() as f64,
            sequences: self.sessions.len(),
            copy_latency_us: 0.0,
            gather_bytes_per_us: rate(sum(Kind::Gather)),
            link_bytes_per_us: rate(sum(Kind::CopyIn)),
        }
    }

    /// The step of median length of each schedule.
    fn panels(&self) -> Vec<Panel> {
        let panel = |schedule: Schedule| {
            let mut steps: Vec<_> = self.steps(schedule).collect();
            steps.sort_by(|a, b| a.us.total_cmp(&b.us));
            let step = steps.get(steps.len() / 2)?;
            let compute = |slice: &&Slice| slice.stream == StreamId::Compute;
            let own = || self.slices_of(step).filter(compute);
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
    /// Microseconds of each [`Kind`].
    us: [f64; Kind::ALL.len()],
    /// Bytes that came from the host.
    bytes: f64,
}

impl LayerRun {
    fn add(&mut self, slice: &Slice) {
        if slice.node.is_some() {
            return; // a part of a gather that is counted
        }
        let kind = Kind::of(slice);
        self.us[kind as usize] += slice.us();
        if kind == Kind::CopyIn {
            self.bytes += slice.bytes as f64;
        }
    }

    fn divide(&mut self, count: f64) {
        self.us.iter_mut().chain([&mut self.bytes]).for_each(|x| *x /= count);
    }

    fn of(&self, kind: Kind) -> f64 {
        self.us[kind as usize]
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
    let header: Vec<&str> = ["layer"].into_iter().chain(COLUMNS.map(Kind::name)).chain(["fetched"]).collect();
    print(&table(&header, &rows))?;
    let saved = bench.sessions.iter().filter_map(|session| session.stats().saved()).fold(0.0, |a, b| a + b);
    if bench.engine.device().options().delta {
        print(&format!(
            "\n{:.1} % of the selected pairs were in their slots already.\n",
            100.0 * saved / bench.sessions.len() as f64
        ))?;
    }
    Ok(())
}

/// What a layer's time goes to, and that of its fetch.
const COLUMNS: [Kind; 5] = [Kind::Attention, Kind::Dense, Kind::Exposed, Kind::Gather, Kind::CopyIn];

fn layer_row((layer, run): (usize, LayerRun)) -> Vec<String> {
    let us = COLUMNS.map(|kind| format!("{:.1}", run.of(kind)));
    [layer.to_string()].into_iter().chain(us).chain([size::show(run.bytes as u64)]).collect()
}
