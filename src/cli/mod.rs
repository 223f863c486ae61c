//! Arguments become calls of the engine. Data goes to stdout, all else to stderr.

mod args;
mod bench;
mod chat;
mod count;
mod devices;
mod doctor;
mod eval;
mod generate;
mod input;
mod logits;
mod output;
mod places;
mod plan;
mod precedence;
mod progress;
mod shared_args;
mod shell;
mod size;

use std::io::ErrorKind;
use std::panic;
use std::path::Path;
use std::process::{ExitCode, exit};
use std::sync::atomic::{AtomicBool, Ordering};

use specache::device::interrupt;
use specache::error::{Error, Result};

use args::{Cli, Command};
use progress::say;

/// Parses the arguments, runs the command and reports how it ended.
pub fn main() -> ExitCode {
    panic::set_hook(Box::new(report_panic));
    interrupt::install();
    let outcome = panic::catch_unwind(|| args::parse().and_then(run));
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough.
        Ok(Err(error)) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            say(format_args!("error: {error}"));
            ExitCode::from(error.exit_code())
        }
        // The hook has spoken. Not a return: threads that still work are not waited for.
        Err(_) => exit(1),
    }
}

fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Logits(args) => logits::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Plan(args) => plan::run(&args),
        Command::Devices => devices::run(),
        Command::Doctor => doctor::run(),
        Command::Completions(args) => shell::completions(&args),
        Command::Man(args) => shell::man(&args),
    }
}

fn is_closed_pipe(error: &Error) -> bool {
    let Error::Io { file, source } = error else { return false };
    file == Path::new(output::STDOUT) && source.kind() == ErrorKind::BrokenPipe
}

/// One message for people; a panic that follows from the first says nothing new, and one that becomes an error is told as
/// such.
fn report_panic(panic: &panic::PanicHookInfo) {
    static REPORTED: AtomicBool = AtomicBool::new(false);
    if !specache::tokenizer::is_guarded() && !REPORTED.swap(true, Ordering::Relaxed) {
        let what = panic.payload_as_str().unwrap_or("a panic without a message");
        let place = panic.location().map(|at| format!(" ({}:{})", at.file(), at.line())).unwrap_or_default();
        say(format_args!("error: internal error: {what}{place}; please report this"));
    }
}
