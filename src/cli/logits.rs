//! `logits`: teacher forcing into an NPY file.

use serde_json::{Value, json};
use specache::Engine;
use specache::device::interrupt;
use specache::error::{Error, Result};
use specache::kv::{KvMode, KvOptions};
use specache::session::{Selections, Session, Trace};
use specache::teacher::{Forced, forced};

use super::args::LogitsArgs;
use super::output::{AtomicFile, npy_header, traced};
use super::progress::{Progress, say};
use super::{generate, input};

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with the arguments, the model or the output files.
pub fn run(args: LogitsArgs) -> Result<()> {
    let (kv, device) = (args.kv.options(), args.model.device.options()?);
    let ids = input::ids("--tokens", &args.tokens)?;
    let speculative = args.spec_tokens.as_ref().map(|file| input::ids("--spec-tokens", file)).transpose()?;
    check_modes(&args, &kv)?;
    let mut progress = Progress::new();
    progress.announce(format_args!("loading {}", args.model.model));
    let engine = Engine::load(&args.model.model, &device)?;
    let vocab_size = engine.model().config.vocab_size;
    input::check_ids("--tokens", &ids, vocab_size)?;
    input::check_ids("--spec-tokens", speculative.as_deref().unwrap_or_default(), vocab_size)?;
    let mut npy = AtomicFile::create("-o", &args.output)?;
    let timeline = args.model.device.trace_file()?;
    let trace = args.trace_selections.as_deref().map(|file| AtomicFile::create("--trace-selections", file));
    let mut trace = trace.transpose()?;

    let _ctrl_c = interrupt::forward(engine.interrupt_flag());
    let n_rows = ids.len().saturating_sub(args.prefill);
    npy.write(&npy_header(n_rows, vocab_size))?;
    progress.show(format_args!("prefill of {} tokens", args.prefill));
    let what = Forced { ids: &ids, prefill: args.prefill, speculative: speculative.as_deref(), trace: trace.is_some() };
    let mut row = 0;
    let session = forced(&engine, kv, what, |logits| {
        row += 1;
        progress.show(format_args!("row {row} of {n_rows}"));
        npy.write(bytemuck::cast_slice(&little_endian(logits)))
    });
    progress.clear();
    let session = traced(timeline, engine.device(), Vec::new(), session)?;
    write_all(npy, &mut trace, &session)?;
    say(format_args!("{n_rows} rows of {vocab_size} logits in {}", args.output.display()));
    generate::say_cache(&engine, &session);
    Ok(())
}

/// Options that need a mode.
fn check_modes(args: &LogitsArgs, kv: &KvOptions) -> Result<()> {
    if args.trace_selections.is_some() && !kv.mode.fetches() {
        let mode = kv.mode.name();
        return Err(Error::Usage(format!("--trace-selections: --kv {mode} selects nothing; use specache or fetch")));
    }
    if args.spec_tokens.is_some() && kv.mode != KvMode::SpeCache {
        say(format_args!("warning: --spec-tokens has no effect with --kv {}", kv.mode.name()));
    }
    Ok(())
}

/// Both files are written before either gets its name.
fn write_all(mut npy: AtomicFile, trace: &mut Option<AtomicFile>, session: &Session) -> Result<()> {
    npy.flush()?;
    if let (Some(mut file), Some(trace)) = (trace.take(), session.trace()) {
        file.write(trace_json(trace, session.kv().top_k).to_string().as_bytes())?;
        file.write(b"\n")?;
        file.commit()?;
    }
    npy.commit()
}

/// The bytes of an NPY file are little endian on every machine.
fn little_endian(row: &[f32]) -> Vec<[u8; 4]> {
    row.iter().map(|x| x.to_le_bytes()).collect()
}

fn trace_json(trace: &Trace, top_k: usize) -> Value {
    let selections = |s: &Selections| selections_json(s, top_k);
    json!({
        "speculative": trace.speculative,
        "pre_decode": selections(&trace.pre_decode),
        "steps": trace.steps.iter().map(selections).collect::<Vec<_>>(),
    })
}

/// `[layer][kv head][positions]`; null where nothing is offloaded yet, so that there was nothing to select.
fn selections_json(selections: &Selections, top_k: usize) -> Value {
    let positions = |p: &Vec<u32>| if p.is_empty() && top_k > 0 { Value::Null } else { json!(p) };
    let layers = selections.iter().map(|heads| heads.iter().map(positions).collect::<Vec<_>>());
    json!(layers.collect::<Vec<_>>())
}
