//! Whole numbers as people write them: where a count is wanted, what is none is told in words that name the fix.

use std::any::TypeId;
use std::num::{IntErrorKind, ParseIntError};
use std::str::FromStr;

use clap::{Arg, ArgAction};

/// The option, with words of ours for what is no count, and a number below zero taken for its value, so that it can be told:
/// none of our options is a digit. Tokens are counted in thousands of 1,024, too: `128k`.
pub fn explained(arg: Arg) -> Arg {
    let kind = arg.get_value_parser().type_id();
    let of_tokens = arg.get_value_names().is_some_and(|names| names.iter().any(|name| name.starts_with("TOKENS")));
    let arg = match () {
        () if kind == TypeId::of::<usize>() && of_tokens => arg.value_parser(tokens),
        () if kind == TypeId::of::<usize>() => arg.value_parser(parse::<usize>),
        () if kind == TypeId::of::<u64>() && arg.get_id() == "seed" => arg.value_parser(parse::<u64>),
        () => arg,
    };
    let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
    if takes_value { arg.allow_negative_numbers(true) } else { arg }
}

/// A number of tokens.
fn tokens(text: &str) -> Result<usize, String> {
    match text.strip_suffix(['k', 'K']) {
        Some(thousands) if thousands.bytes().all(|c| c.is_ascii_digit()) => {
            parse::<usize>(thousands)?.checked_mul(1024).ok_or_else(|| TOO_LARGE.into())
        }
        _ => parse(text),
    }
}

const TOO_LARGE: &str = "larger than any number can be here; give a smaller one";

fn parse<T: FromStr<Err = ParseIntError>>(text: &str) -> Result<T, String> {
    let below_zero = || text.strip_prefix('-').is_some_and(|rest| rest.parse::<f64>().is_ok());
    text.parse().map_err(|why: ParseIntError| match why.kind() {
        IntErrorKind::PosOverflow => TOO_LARGE.into(),
        _ if below_zero() => "it cannot be below zero; give a whole number, such as 64".into(),
        // Where a list can be, it has been taken apart.
        _ if text.contains(',') => "it must be one whole number, such as 64: no list can be here".into(),
        _ => "it must be a whole number, such as 64".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_counted_in_thousands_of_1024_too() {
        assert_eq!((tokens("128k"), tokens("1K"), tokens("1000")), (Ok(131_072), Ok(1024), Ok(1000)));
        for bad in ["k", "1.5k", "-1k", "1kk", "18446744073709551615k", "1m"] {
            assert!(tokens(bad).is_err(), "{bad}");
        }
    }
}
