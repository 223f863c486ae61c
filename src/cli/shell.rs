//! `completions` and `man`: what shells and `man` know of this command, made from its arguments.

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use specache::error::{Error, Result};

use super::args::{Cli, CompletionsArgs, ManArgs};
use super::output::{AtomicFile, print};

/// Prints the completions of a shell.
///
/// # Errors
/// [`Error::Io`] where stdout cannot be written.
pub fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut command = Cli::command();
    let (name, mut script) = (command.get_name().to_string(), Vec::new());
    clap_complete::generate(args.shell, &mut command, name, &mut script);
    // clap_complete 4.6.11 writes the hyphen of our name in two ways for bash, so that no subcommand would be completed.
    print(&String::from_utf8_lossy(&script).replace("specache__subcmd__engine", "specache__engine"))
}

/// Prints the main page, or writes a page for each command.
///
/// # Errors
/// [`Error::Io`] where stdout or the folder cannot be written.
pub fn man(args: &ManArgs) -> Result<()> {
    let mut main = Cli::command().disable_help_subcommand(true);
    main.build();
    let Some(folder) = &args.output else { return print(&String::from_utf8_lossy(&page(&manual(main)))) };
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    for command in with_all_below(&main) {
        let manual = manual(command.clone());
        let mut file = AtomicFile::create("-o", &folder.join(manual.get_filename()))?;
        file.write(&page(&manual))?;
        file.commit()?;
    }
    Ok(())
}

fn with_all_below(command: &Command) -> Vec<&Command> {
    [command].into_iter().chain(command.get_subcommands().flat_map(with_all_below)).collect()
}

fn manual(command: Command) -> Man {
    Man::new(command).source(format!("specache-engine {}", env!("CARGO_PKG_VERSION")))
}

fn page(manual: &Man) -> Vec<u8> {
    let mut page = Vec::new();
    manual.render(&mut page).expect("memory takes everything");
    page
}
