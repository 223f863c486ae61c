//! A long text becomes windows of one length, one after the other: each is a run of its own.

use crate::error::{Error, Result};

/// How a text is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Tokens of a window.
    pub length: usize,
    /// Tokens of a window that are its prompt: from 1 to `length - 2`, so that at least one decode step is scored.
    pub prefill: usize,
    /// Most windows.
    pub most: usize,
}

/// Cuts `tokens` into windows `[0, m)`, `[m, 2m)`, ... of `m = length - prefix.len()` tokens, each behind `prefix` (the
/// special tokens that a text begins with). What is left over at the end is not used.
///
/// # Errors
/// [`Error::Usage`] for a prompt length that does not fit, and for a text shorter than one window.
pub fn cut(tokens: &[u32], prefix: &[u32], cut: Cut) -> Result<Vec<Vec<u32>>> {
    let Cut { length, prefill, most } = cut;
    let usage = |what: String| Err(Error::Usage(what));
    if length < 3 {
        return usage(format!(
            "--ctx-size {length}: a window has at least 3 tokens: a prompt, one that is fed, one scored"
        ));
    }
    if prefill == 0 || prefill > length - 2 {
        return usage(format!(
            "--prefill {prefill}: must be from 1 to {}, with windows of {length} tokens",
            length - 2
        ));
    }
    if most == 0 {
        return usage("--windows 0: at least one is needed".into());
    }
    let own = length.saturating_sub(prefix.len());
    if own == 0 || tokens.len() < own {
        let (has, needed) = (tokens.len() + prefix.len(), length.max(prefix.len() + 1));
        return usage(format!(
            "the text has {has} tokens, a window {needed}: give a longer text or a smaller --ctx-size"
        ));
    }
    Ok(tokens.chunks_exact(own).take(most).map(|own| [prefix, own].concat()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_follow_each_other_behind_the_prefix() {
        let tokens: Vec<u32> = (10..21).collect();
        let windows = cut(&tokens, &[1], Cut { length: 5, prefill: 2, most: 9 }).unwrap();
        assert_eq!(windows, [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17]]);
        let windows = cut(&tokens, &[], Cut { length: 5, prefill: 3, most: 1 }).unwrap();
        assert_eq!(windows, [[10, 11, 12, 13, 14]]);
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let refused =
            |length, prefill, most| cut(&[1, 2, 3, 4, 5], &[], Cut { length, prefill, most }).unwrap_err().to_string();
        assert!(refused(2, 1, 1).contains("--ctx-size 2"));
        assert!(refused(4, 3, 1).contains("--prefill 3: must be from 1 to 2"));
        assert!(refused(4, 0, 1).contains("--prefill 0"));
        assert!(refused(4, 2, 0).contains("--windows 0"));
        assert!(refused(6, 2, 1).contains("the text has 5 tokens, a window 6"));
    }
}
