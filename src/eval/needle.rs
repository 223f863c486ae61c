//! A needle in a haystack: a sentence is planted in a long text, and asked for at its end.
//!
//! The haystack is cut at its sentences, and begins again where it is too short. A prompt has at most the wanted number of
//! tokens, by no more than a sentence less; the needle stands between two sentences, as near to its depth as they allow.

use crate::error::{Error, Result};
use crate::eval::metrics::{normalised_words, share_found};
use crate::tokenizer::Tokenizer;

/// Longest piece of a haystack without the end of a sentence, bytes.
const LONGEST_PIECE: usize = 400;

/// What is planted, how it is asked for, and what is expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needle {
    /// The sentence in the haystack.
    pub needle: String,
    /// What stands behind the haystack; the answer follows.
    pub question: String,
    /// What is to be found.
    pub answer: String,
}

impl Default for Needle {
    fn default() -> Self {
        Needle {
            needle: "The number that opens the blue safe is 48317.".into(),
            question: "\n\nQuestion: Which number opens the blue safe?\nAnswer: The number that opens the blue safe is"
                .into(),
            answer: "48317".into(),
        }
    }
}

/// Share of the expected words that the answer has, in order ([`share_found`]), without case, ASCII punctuation and
/// articles.
pub fn score(said: &str, expected: &str) -> f64 {
    share_found(&normalised_words(said), &normalised_words(expected))
}

/// A text to hide a needle in.
pub struct Haystack {
    /// Sentences, each with the space before it, and about how many tokens it has.
    pieces: Vec<(String, usize)>,
    tokens: usize,
}

impl Haystack {
    /// Cuts a text into sentences.
    ///
    /// # Errors
    /// [`Error::Usage`] for a text without words; [`Error::Model`] as [`Tokenizer::encode`].
    pub fn new(tokenizer: &Tokenizer, text: &str) -> Result<Haystack> {
        let pieces = sentences(text).into_iter().map(|piece| {
            let tokens = tokenizer.encode(piece, false)?.len().max(1);
            Ok((piece.to_owned(), tokens))
        });
        let mut pieces: Vec<(String, usize)> = pieces.collect::<Result<_>>()?;
        let Some((first, _)) = pieces.first_mut() else {
            return Err(Error::Usage("--haystack: the text is empty; any long text will do".into()));
        };
        // It follows the last one where the text begins again.
        if !first.starts_with(char::is_whitespace) {
            first.insert(0, ' ');
        }
        let tokens = pieces.iter().map(|(_, tokens)| tokens).sum();
        Ok(Haystack { pieces, tokens })
    }

    /// Tokens of the text, about.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// A prompt of at most `length` tokens, with the needle at `depth` (0: at the beginning, 1: just before the question).
    /// `ids` turns the text into tokens: plainly, or by a chat template.
    ///
    /// # Errors
    /// [`Error::Usage`] if the needle and its question alone are longer; whatever `ids` returns.
    pub fn prompt(
        &self,
        needle: &Needle,
        length: usize,
        depth: f64,
        ids: impl Fn(&str) -> Result<Vec<u32>>,
    ) -> Result<Vec<u32>> {
        let with = |pieces: usize| ids(&self.text(needle, pieces, depth));
        let least = with(0)?;
        if least.len() > length {
            let needed = least.len();
            return Err(Error::Usage(format!(
                "--lengths {length}: the needle and its question alone are {needed} tokens"
            )));
        }
        // Tokens of joined pieces are not the sum of theirs, so the number of pieces is searched for, from a good guess on.
        // A piece has at least one token, so more pieces than `length` never fit.
        let (mut fits, mut best, mut over) = (0, least, length + 1);
        let guess = self.pieces_of(length - best.len()).clamp(1, length);
        let (mut at, mut step) = (guess, guess / 32 + 1);
        while over - fits > 1 {
            let prompt = with(at)?;
            match prompt.len() <= length {
                true => (fits, best) = (at, prompt),
                false => over = at,
            }
            at = if over > length {
                (fits + step).min(length)
            } else {
                usize::midpoint(fits, over).max(over - step.min(over))
            };
            step *= 2;
        }
        Ok(best)
    }

    /// How many pieces have `tokens` tokens together, about.
    fn pieces_of(&self, tokens: usize) -> usize {
        let (mut pieces, mut left) = (tokens / self.tokens * self.pieces.len(), tokens % self.tokens);
        for (_, n) in &self.pieces {
            if *n > left {
                break;
            }
            (pieces, left) = (pieces + 1, left - n);
        }
        pieces
    }

    /// So many pieces, with the needle among them, and the question.
    fn text(&self, needle: &Needle, pieces: usize, depth: f64) -> String {
        let piece = |i: usize| &self.pieces[i % self.pieces.len()];
        let total: usize = (0..pieces).map(|i| piece(i).1).sum();
        let target = depth * total as f64;
        let (mut at, mut before) = (0, 0);
        // The border between two pieces that is nearest to the depth.
        while at < pieces && (before as f64 + piece(at).1 as f64 / 2.0) < target {
            (at, before) = (at + 1, before + piece(at).1);
        }
        let mut text: String = (0..at).map(|i| piece(i).0.as_str()).collect();
        append(&mut text, &needle.needle);
        text.extend((at..pieces).map(|i| piece(i).0.as_str()));
        append(&mut text, &needle.question);
        text.trim_start().to_owned()
    }
}

/// Adds a part with a space before it, unless it has one.
fn append(text: &mut String, part: &str) {
    if !part.starts_with(char::is_whitespace) {
        text.push(' ');
    }
    text.push_str(part);
}

/// The sentences of a text, each with the white space before it: they end behind `.`, `!`, `?` or a line's end, and where they
/// are long, behind a word. White space at the text's end is dropped.
fn sentences(text: &str) -> Vec<&str> {
    let text = text.trim_end();
    let (mut pieces, mut start, mut before) = (Vec::new(), 0, ' ');
    for (at, c) in text.char_indices() {
        let ended = matches!(before, '.' | '!' | '?') || c == '\n' || at - start >= LONGEST_PIECE;
        if c.is_whitespace() && ended && !text[start..at].trim().is_empty() {
            pieces.push(&text[start..at]);
            start = at;
        }
        before = c;
    }
    if !text[start..].trim().is_empty() {
        pieces.push(&text[start..]);
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn texts_are_cut_at_sentences() {
        assert_eq!(sentences("One. Two!\nThree 3.5\n\n four? "), ["One.", " Two!", "\nThree 3.5", "\n\n four?"]);
        assert_eq!(sentences(" \n "), [""; 0]);
        let long = "word ".repeat(200);
        let pieces = sentences(&long);
        assert!(pieces.len() > 1 && pieces.iter().all(|p| p.len() <= LONGEST_PIECE + 5), "{pieces:?}");
        assert_eq!(pieces.concat(), long.trim_end());
    }

    #[test]
    fn scores_by_hand() {
        assert_eq!(score(" fimi maga losu.", "fimi maga losu"), 1.0);
        assert_eq!(score("fimi losu losu", "fimi maga losu"), 2.0 / 3.0);
        assert_eq!(score("It is 48317, I think", "48317"), 1.0);
        assert_eq!(score("It is 483170", "48317"), 0.0);
    }

    /// Lengths are met to within a sentence, for haystacks that are longer and shorter, and the needle moves with its depth.
    #[test]
    fn prompts_have_their_length_and_the_needle_its_depth() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/recall");
        let tokenizer = Tokenizer::load(&folder).unwrap().unwrap();
        let text = "The green forest stood across the valley while it rained. Paula carried the golden rocket. Nobody \
                    visited the bridge before the storm. Lucas and Maria guarded a forest beside the road. ";
        let needle = Needle {
            needle: "The password of zili fimi maga losu.".into(),
            question: "Recall zili".into(),
            answer: "fimi maga losu".into(),
        };
        let ids = |text: &str| tokenizer.encode(text, true);
        for repeated in [1, 40] {
            let haystack = Haystack::new(&tokenizer, &text.repeat(repeated)).unwrap();
            for length in [60, 100, 500, 1000] {
                let mut last = None;
                for depth in [0.0, 0.25, 0.5, 1.0] {
                    let prompt = haystack.prompt(&needle, length, depth, ids).unwrap();
                    assert!(prompt.len() <= length && prompt.len() + 25 > length, "{} of {length}", prompt.len());
                    let text = tokenizer.decode(&prompt).unwrap();
                    let at = text.find("zili fimi").unwrap();
                    assert!(text.ends_with("Recall zili"), "{text}");
                    let share = at as f64 / text.len() as f64;
                    assert!((share - depth).abs() < 0.1 + 40.0 / length as f64, "{share} at {depth} of {length}");
                    assert!(last < Some(at), "{last:?} {at}");
                    last = Some(at);
                }
            }
            let short = haystack.prompt(&needle, 9, 0.5, ids).unwrap_err().to_string();
            assert!(short.contains("--lengths 9: the needle and its question alone are 10 tokens"), "{short}");
        }
        assert!(Haystack::new(&tokenizer, " \n").is_err());
    }
}
