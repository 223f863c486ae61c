//! `bench`: the KV modes side by side, in turns, on one machine.

mod decode;
mod models;
mod overlap;
mod plot;
mod prompts;
mod report;
mod simulate;
mod timeline;

use std::time::Instant;

use specache::context::{MAX_BATCH, MAX_CONTEXT};
use specache::device::{Device, interrupt};
use specache::error::{Error, Result};
use specache::kv::KvMode;
use specache::model::config_of;
use specache::{Buffers, Engine, Prompt, Session};

use self::report::Report;
use super::args::BenchArgs;
use super::output::AtomicFile;
use super::progress::{Progress, say};

/// Seed of the random pairs.
const SEED: u64 = 1;

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with the arguments or a model.
pub fn run(mut args: BenchArgs) -> Result<()> {
    let mut modes = Vec::new();
    args.kv.retain(|mode| {
        !modes.contains(mode) && {
            modes.push(*mode);
            true
        }
    });
    check(&args)?;
    check_combination(&args)?;
    if args.simulate {
        return simulate::run(&args);
    }
    if args.overlap {
        return overlap::run(&args);
    }
    let start = Instant::now();
    let plot = args.plot.as_deref().map(|file| AtomicFile::create("--plot", file)).transpose()?;
    let models = models::chosen(&args.model);
    // A name that is wrong shows before the models ahead of it are measured.
    models.iter().try_for_each(|model| config_of(model).map(drop))?;
    let mut progress = Progress::new();
    progress.announce("measuring how fast this device reads its memory");
    let mut report = Report::new(&args.output, machine(&args)?);
    progress.clear();
    report.begin()?;
    for model in models {
        grid(&args, &model, &mut report, &mut progress)?;
    }
    report.end()?;
    if let Some(mut file) = plot {
        file.write(plot::svg(report.decoded()).as_bytes())?;
        file.commit()?;
    }
    say(format_args!("took {:.1} s", start.elapsed().as_secs_f64()));
    Ok(())
}

/// One model: every prompt, then every depth, with every batch.
fn grid(args: &BenchArgs, model: &str, report: &mut Report, progress: &mut Progress) -> Result<()> {
    progress.announce(format_args!("loading {model}"));
    let engine = Engine::load(model, &args.device.options()?)?;
    let _ctrl_c = interrupt::forward(engine.interrupt_flag());
    for &tokens in &args.prompt {
        for &batch in &args.batch {
            let result = prompts::bench(args, &engine, model, tokens, batch, progress)?;
            progress.clear();
            report.add_prompts(&result)?;
        }
    }
    if args.n_predict == Some(0) {
        return Ok(());
    }
    let depths: Vec<Option<usize>> = match &args.depth[..] {
        [] => vec![None],
        depths => depths.iter().copied().map(Some).collect(),
    };
    for depth in depths {
        for &batch in &args.batch {
            let result = decode::bench(args, &engine, model, depth, batch, progress)?;
            progress.clear();
            report.add(result)?;
        }
    }
    Ok(())
}

/// What `--simulate` heeds. It runs nothing.
const OF_SIMULATE: [&str; 10] = [
    "--simulate",
    "--gpu",
    "--model",
    "--depth",
    "--kv-bits",
    "--kv-group",
    "--kv-residual",
    "--kv-top-k",
    "--kv-dtype",
    "--output",
];

/// What would have no effect is refused: of the command line, all of it; of variables, which may be meant for other runs, what
/// would be missed.
fn check_combination(args: &BenchArgs) -> Result<()> {
    let usage = |what: &str| Err(Error::Usage(what.into()));
    let alone = !args.overlap && !args.simulate;
    match (args.overlap, args.simulate) {
        // A variable may be meant for `plan`.
        (_, false) if args.typed.iter().any(|option| option == "--gpu") => usage("--gpu: goes with --simulate only"),
        (false, _) if args.device.trace.is_some() => usage("--trace: bench writes one with --overlap only"),
        (_, true) if args.plot.is_some() => usage("--plot: --simulate draws nothing; leave it out"),
        (_, true) if args.batch != [1] => usage("--batch: --simulate has batches of its own; leave it out"),
        (true, _) if args.batch.len() > 1 || args.depth.len() > 1 => {
            usage("--overlap: one depth and one batch at a time")
        }
        _ if args.n_predict == Some(0) && (args.prompt.is_empty() || !alone) => {
            usage("-n 0: at least one is needed, but with -p")
        }
        (true, _) if args.forks => usage("--forks: --overlap fills each cache with pairs of its own; leave it out"),
        (false, false) if args.forks && args.n_predict == Some(0) => usage("--forks is about decoding; leave out -n 0"),
        (false, false) if args.forks && args.batch.iter().all(|&batch| batch == 1) => {
            usage("--forks: one sequence has none; give -b 2 or more")
        }
        _ if args.n_predict == Some(0) && args.plot.is_some() => usage("--plot draws decoding; leave out -n 0"),
        _ if alone => Ok(()),
        _ if !args.prompt.is_empty() => usage("-p: --overlap and --simulate are about decoding; leave it out"),
        _ if args.output != "md" => usage("-o: --overlap and --simulate print tables only"),
        _ if args.kv != KvMode::ALL => usage("--kv: --overlap and --simulate are about specache; leave it out"),
        (_, true) => match args.typed.iter().find(|option| !OF_SIMULATE.contains(&option.as_str())) {
            Some(option) => {
                usage(&format!("{option}: --simulate runs nothing, so that it has no effect; leave it out"))
            }
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

fn check(args: &BenchArgs) -> Result<()> {
    let numbers = [
        ("-d", &args.depth, MAX_CONTEXT, "tokens"),
        ("-p", &args.prompt, MAX_CONTEXT, "tokens"),
        ("-b", &args.batch, MAX_BATCH, "sequences"),
    ];
    for (option, all, most, what) in numbers {
        if all.contains(&0) {
            return Err(Error::Usage(format!("{option} 0: at least one is needed")));
        }
        if let Some(number) = all.iter().find(|&&number| number > most) {
            return Err(Error::Usage(format!("{option} {number}: at most {most} {what} are supported")));
        }
    }
    match args.repetitions {
        0 => Err(Error::Usage("-r 0: at least one is needed".into())),
        _ => Ok(()),
    }
}

/// What the benchmark runs on.
pub struct Machine {
    /// Model name of the CPU.
    pub cpu: String,
    /// Threads that compute on the CPU device.
    pub threads: usize,
    pub isa: String,
    pub device: String,
    /// Why it is the CPU, where that was left open.
    pub why_no_gpu: Option<String>,
    /// Whether it is a GPU: then the CPU only launches.
    pub is_gpu: bool,
    /// Gigabytes per second that the device reads from its memory; `None` where memory is too short to measure it.
    pub read_gbps: Option<f64>,
}

fn machine(args: &BenchArgs) -> Result<Machine> {
    let device = Device::open(&args.device.options()?)?;
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    Ok(Machine {
        cpu: cpu.map_or("unknown CPU", |(_, name)| name).to_string(),
        threads: device.threads(),
        isa: device.isa().to_string(),
        device: device.describe(),
        why_no_gpu: device.why_no_gpu().map(str::to_string),
        is_gpu: device.is_gpu(),
        read_gbps: device.read_gbps()?,
    })
}

/// Logits of the last row, and seconds. A short prefill of another session goes before it, untimed, and sizes
/// the buffers.
fn prefill(engine: &Engine, session: &mut Session, tokens: &[u32], buffers: &mut Buffers) -> Result<(Vec<f32>, f64)> {
    let first = &tokens[..tokens.len().min(32)];
    let mut warm_up = engine.session(*session.kv(), first.len())?;
    engine.prefill(&mut [Prompt { session: &mut warm_up, tokens: first }], buffers)?;
    let start = Instant::now();
    let logits = engine.prefill(&mut [Prompt { session, tokens }], buffers)?.remove(0)?;
    Ok((logits, start.elapsed().as_secs_f64()))
}
