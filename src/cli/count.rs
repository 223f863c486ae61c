//! Whole numbers as people write them: where a count is wanted, what is none is told in words that name the fix.

use std::any::TypeId;
use std::num::{IntErrorKind, ParseIntError};
use std::str::FromStr;

use clap::{Arg, ArgAction};

/// The option, with words of ours for what is no count, and a number below zero taken for its value, so that it can be told:
/// none of our options is a digit.
pub fn explained(arg: Arg) -> Arg {
    let kind = arg.get_value_parser().type_id();
    let arg = match () {
        () if kind == TypeId::of::<usize>() => arg.value_parser(parse::<usize>),
        () if kind == TypeId::of::<u64>() && arg.get_id() == "seed" => arg.value_parser(parse::<u64>),
        () => arg,
    };
    let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
    if takes_value { arg.allow_negative_numbers(true) } else { arg }
}

fn parse<T: FromStr<Err = ParseIntError>>(text: &str) -> Result<T, String> {
    let below_zero = || text.strip_prefix('-').is_some_and(|rest| rest.parse::<f64>().is_ok());
    text.parse().map_err(|why: ParseIntError| match why.kind() {
        IntErrorKind::PosOverflow => "larger than any number can be here; give a smaller one".into(),
        _ if below_zero() => "it cannot be below zero; give a whole number, such as 64".into(),
        _ => "it must be a whole number, such as 64".into(),
    })
}
