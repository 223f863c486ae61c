//! The command line of SpeCache: see `specache-engine --help`.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
