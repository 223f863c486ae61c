//! Whose word counts where options exclude each other: the command line's before that of the environment.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

/// A text, or token ids.
const TEXT: &[&[&str]] = &[&["file"], &["tokens"]];

/// A command, by the words on the way to it, and sides of which only one may have its say.
const SIDES: [(&[&str], &[&[&str]]); 6] = [
    (&["generate"], &[&["prompt"], &["file"], &["tokens"]]),
    (&["bench"], &[&["simulate"], &["overlap"]]),
    (&["eval", "ppl"], TEXT),
    (&["eval", "kld"], TEXT),
    (&["eval", "coverage"], TEXT),
    (&["eval", "needle"], &[&["prompts"], &["haystack", "lengths", "depths", "needle", "question", "answer", "chat"]]),
];

/// The command without the variables that have no say for these arguments: those of the sides that exclude a side on the command
/// line, and those of flags that say no, which exclude nothing. Two sides of one source are left to the command itself.
pub fn settle(command: Command, args: &[OsString]) -> Command {
    let command = each_arg(command, &|arg| if says_no(&arg) { arg.env(None::<&str>) } else { arg });
    let bare = each_arg(command.clone(), &|arg| arg.env(None::<&str>)).ignore_errors(true);
    // An error here is a question for help or the version.
    let Ok(typed) = bare.try_get_matches_from(args) else { return command };
    SIDES.iter().fold(command, |command, (path, sides)| {
        let Some(matches) = below(&typed, path) else { return command };
        let is_typed =
            |side: &&[&str]| side.iter().any(|id| matches.value_source(id) == Some(ValueSource::CommandLine));
        if !sides.iter().any(is_typed) {
            return command;
        }
        let silent: Vec<&str> =
            sides.iter().filter(|side| !is_typed(side)).flat_map(|side| side.iter().copied()).collect();
        at(command, path, &|command| {
            silent.iter().fold(command, |command, id| command.mut_arg(id, |a| a.env(None::<&str>)))
        })
    })
}

/// An error about a value, which names the variable where that is what it came from: without variables, there is none.
pub fn blame(mut why: clap::Error, mut command: Command, args: &[OsString]) -> clap::Error {
    let Some(ContextValue::String(option)) = why.get(ContextKind::InvalidArg).cloned() else { return why };
    if !matches!(why.kind(), ErrorKind::InvalidValue | ErrorKind::ValueValidation) {
        return why;
    }
    let bare = each_arg(command.clone(), &|arg| arg.env(None::<&str>));
    // Only a command that is built can name its options.
    command.build();
    let typed = bare.try_get_matches_from(args).is_err_and(|typed| {
        typed.kind() == why.kind() && typed.get(ContextKind::InvalidArg) == why.get(ContextKind::InvalidArg)
    });
    if let Some(variable) = variable(&command, &option).filter(|_| !typed) {
        why.insert(ContextKind::InvalidArg, ContextValue::String(format!("{option}' of the variable '{variable}")));
    }
    why
}

/// The variable of an option as errors name it, such as `--kv <MODE>`, among those that are set.
fn variable(command: &Command, option: &str) -> Option<String> {
    let own = command.get_arguments().filter(|arg| arg.to_string() == option).filter_map(Arg::get_env);
    let set =
        own.filter(|name| std::env::var_os(name).is_some()).map(|name| name.to_string_lossy().into_owned()).next();
    set.or_else(|| command.get_subcommands().find_map(|command| variable(command, option)))
}

/// The options of a command that are on the command line, as `--name`.
pub fn typed(all: &Command, matches: &ArgMatches, command: &str) -> Vec<String> {
    let (Some(command), Some(matches)) = (all.find_subcommand(command), matches.subcommand_matches(command)) else {
        return Vec::new();
    };
    let is_typed = |arg: &&Arg| matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
    command.get_arguments().filter(is_typed).filter_map(|arg| Some(format!("--{}", arg.get_long()?))).collect()
}

/// Whether a flag's variable is empty, or one of the words by which `BoolishValueParser` means no.
fn says_no(arg: &Arg) -> bool {
    let said = arg.get_env().and_then(std::env::var_os).map(|value| value.to_string_lossy().to_lowercase());
    let no = ["", "0", "n", "no", "f", "false", "off"];
    matches!(arg.get_action(), ArgAction::SetTrue) && said.is_some_and(|said| no.contains(&said.as_str()))
}

/// The command with all options of it and of its commands changed.
pub fn each_arg(command: Command, change: &dyn Fn(Arg) -> Arg) -> Command {
    command.mut_args(change).mut_subcommands(|command| each_arg(command, change))
}

fn below<'a>(matches: &'a ArgMatches, path: &[&str]) -> Option<&'a ArgMatches> {
    path.iter().try_fold(matches, |matches, name| matches.subcommand_matches(name))
}

fn at(command: Command, path: &[&str], change: &dyn Fn(Command) -> Command) -> Command {
    match path {
        [] => change(command),
        [name, path @ ..] => command.mut_subcommand(name, |command| at(command, path, change)),
    }
}
