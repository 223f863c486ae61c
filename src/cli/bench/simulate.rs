//! `bench --simulate`: a decode step of `specache` on a card that is not there, under each schedule.

use specache::error::Result;
use specache::kv::cache::CacheBytes;
use specache::kv::{KvMode, KvShape};
use specache::model::{Config, config_of};
use specache::sim::{Gpu, Schedule};

use crate::cli::args::BenchArgs;
use crate::cli::output::{print, table};
use crate::cli::size;

const HEADER: [&str; 11] = [
    "context",
    "batch",
    "compute ms",
    "link ms",
    "bound ms",
    "serial",
    "stream",
    "event",
    "event exposed",
    "event over bound",
    "host KV",
];

/// Prints a table for each model.
///
/// # Errors
/// A model whose configuration cannot be read, options that do not fit it, or a closed stdout.
pub fn run(args: &BenchArgs) -> Result<()> {
    let gpu = Gpu::named(&args.gpu).expect("the command line knows the same names");
    let default = ["synthetic:llama-3-8b".to_string()];
    let models = if args.model.is_empty() { &default[..] } else { &args.model };
    print(&format!(
        "Simulated, not measured: specache on {}, {:.0} GB/s of memory of which kernels read {:.0} %, scattered rows over \
         the link at {:.1} GB/s, {} us until a copy begins. A step from bytes over bandwidth, and what layers and packed \
         pages took an H200 beside; every selected pair is fetched. serial, stream, event: ms a step.\n",
        gpu.name,
        gpu.memory_gbps,
        100.0 * gpu.read_share,
        gpu.gather_gbps,
        gpu.copy_latency_us
    ))?;
    for model in models {
        let config = config_of(model)?;
        let rows = rows(args, &gpu, &config)?;
        print(&format!(
            "\n## {model}, {}-bit codes\n\n{}",
            args.tuning.options(KvMode::SpeCache).bits,
            table(&HEADER, &rows)
        ))?;
    }
    Ok(())
}

fn rows(args: &BenchArgs, gpu: &Gpu, config: &Config) -> Result<Vec<Vec<String>>> {
    let kv = args.tuning.options(KvMode::SpeCache);
    kv.validate(config)?;
    let contexts = if args.depth.is_empty() { vec![8 << 10, 32 << 10, 128 << 10] } else { args.depth.clone() };
    let mut rows = Vec::new();
    for context in contexts {
        let plan = CacheBytes::plan(&KvShape::new(config, &kv), &kv, context + 1);
        let largest = gpu.largest_batch(config, &kv, context);
        let mut batches: Vec<usize> = [1, 8, 24, largest].into_iter().filter(|&b| (1..=largest).contains(&b)).collect();
        batches.sort_unstable();
        batches.dedup();
        for batch in batches {
            let costs = gpu.costs(config, &kv, context, batch, 1.0);
            let ms = |us: f64| format!("{:.2}", us / 1e3);
            let steps = Schedule::ALL.map(|schedule| costs.simulate(schedule));
            let event = &steps[2];
            let mut row = vec![context.to_string(), batch.to_string()];
            row.extend([costs.compute_us(), costs.copy_us(), costs.bound_us()].map(ms));
            row.extend(steps.iter().map(|step| ms(step.step_us)));
            row.push(format!("{:.2} %", 100.0 * event.exposed_us / event.step_us));
            row.push(format!("{:.2} %", 100.0 * (event.step_us / costs.bound_us() - 1.0).max(0.0)));
            row.push(size::show(plan.host * batch as u64));
            rows.push(row);
        }
    }
    Ok(rows)
}
