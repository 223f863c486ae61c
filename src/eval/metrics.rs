//! How an answer is scored against the true one, 0 to 1: LongBench's metrics (Bai et al., 2024, arXiv 2308.14508), as its
//! published scripts compute them, and the share of words found that needles are judged by.
//!
//! Where this differs from those scripts on purpose: digits are ASCII; very long sentences are scored by ROUGE-L too (there
//! they exceed the recursion limit and count as 0); edit similarity is the one of `fuzzywuzzy` with `python-Levenshtein`
//! installed (without it, `fuzzywuzzy` falls back to another ratio, which is never larger).

use std::collections::{HashMap, HashSet};
use std::hash::Hash;

/// Length of the longest common subsequence.
pub fn common_subsequence<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

/// Share of `expected` that is found in `said`, in order: the longest common subsequence over the length of `expected`.
pub fn share_found<T: PartialEq>(said: &[T], expected: &[T]) -> f64 {
    if expected.is_empty() { 1.0 } else { common_subsequence(said, expected) as f64 / expected.len() as f64 }
}

/// Lower-case words without ASCII punctuation and without the articles a, an, the.
pub fn normalised_words(text: &str) -> Vec<String> {
    let text: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    without_articles(&text).split_whitespace().map(str::to_owned).collect()
}

/// Articles become spaces where they stand alone: between characters that are no letters or digits.
fn without_articles(text: &str) -> String {
    let (mut out, mut word) = (String::new(), String::new());
    let flush = |word: &mut String, out: &mut String| {
        out.push_str(if matches!(word.as_str(), "a" | "an" | "the") { " " } else { word });
        word.clear();
    };
    for c in text.chars() {
        if c.is_alphanumeric() {
            word.push(c);
        } else {
            flush(&mut word, &mut out);
            out.push(c);
        }
    }
    flush(&mut word, &mut out);
    out
}

fn counts<T: Eq + Hash>(items: &[T]) -> HashMap<&T, usize> {
    let mut counts = HashMap::new();
    items.iter().for_each(|item| *counts.entry(item).or_insert(0) += 1);
    counts
}

/// F1 of the words that both have, as often as both have them, after normalisation.
pub fn qa_f1(said: &str, truth: &str) -> f64 {
    let (said, truth) = (normalised_words(said), normalised_words(truth));
    let in_truth = counts(&truth);
    let same: usize = counts(&said).iter().map(|(word, n)| in_truth.get(word).map_or(0, |m| *n.min(m))).sum();
    if same == 0 {
        return 0.0;
    }
    let (precision, recall) = (same as f64 / said.len() as f64, same as f64 / truth.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

/// F of ROUGE-L as the package `rouge` 1.0.1 computes it: over the different words of all sentences (which end at full
/// stops), with the union of the longest common subsequences of each true sentence with each said one.
pub fn rouge_l(said: &str, truth: &str) -> f64 {
    let (said, truth) = (sentences(said), sentences(truth));
    if said.is_empty() || truth.is_empty() {
        return 0.0;
    }
    let mut common: HashSet<&str> = HashSet::new();
    for of_truth in &truth {
        said.iter().for_each(|of_said| common.extend(subsequence_words(of_truth, of_said)));
    }
    let different = |sentences: &[Vec<&str>]| sentences.iter().flatten().collect::<HashSet<_>>().len() as f64;
    let (recall, precision) = (common.len() as f64 / different(&truth), common.len() as f64 / different(&said));
    2.0 * (precision * recall / (precision + recall + 1e-8))
}

/// Words of each sentence. One of nothing but spaces is a sentence of one empty word.
fn sentences(text: &str) -> Vec<Vec<&str>> {
    let words = |sentence: &'_ str| -> usize { sentence.split_whitespace().count() };
    let parts = text.split('.').filter(|sentence| !sentence.is_empty());
    parts.map(|s| if words(s) == 0 { vec![""] } else { s.split_whitespace().collect() }).collect()
}

/// The words of one longest common subsequence: of several, the one that is found from the end, leaving `b` first.
fn subsequence_words<'a>(a: &[&'a str], b: &[&str]) -> Vec<&'a str> {
    let width = b.len() + 1;
    let mut table = vec![0u32; (a.len() + 1) * width];
    for (i, x) in a.iter().enumerate() {
        for (j, y) in b.iter().enumerate() {
            table[(i + 1) * width + j + 1] = match x == y {
                true => table[i * width + j] + 1,
                false => table[i * width + j + 1].max(table[(i + 1) * width + j]),
            };
        }
    }
    let (mut i, mut j, mut words) = (a.len(), b.len(), Vec::new());
    while i > 0 && j > 0 {
        if a[i - 1] == b[j - 1] {
            words.push(a[i - 1]);
            (i, j) = (i - 1, j - 1);
        } else if table[(i - 1) * width + j] > table[i * width + j - 1] {
            i -= 1;
        } else {
            j -= 1;
        }
    }
    words
}

/// Of the classes that are named in the answer, one is the true one: 1 over how many there are. A class that is a part of
/// the true one's name does not count (of two that follow each other in the list of those found, one is overlooked, as in
/// the published script).
pub fn classification(said: &str, truth: &str, classes: &[String]) -> f64 {
    let mut found: Vec<&str> = classes.iter().map(String::as_str).filter(|class| said.contains(class)).collect();
    let mut i = 0;
    while i < found.len() {
        let class = found[i];
        if truth.contains(class) && class != truth {
            let first = found.iter().position(|&f| f == class).expect("it is there");
            found.remove(first);
        }
        i += 1;
    }
    if found.contains(&truth) { 1.0 / found.len() as f64 } else { 0.0 }
}

fn numbers(text: &str) -> Vec<&str> {
    text.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty()).collect()
}

fn share_of_numbers(said: &str, truth: &str) -> f64 {
    let numbers = numbers(said);
    let right = numbers.iter().filter(|&&number| number == truth).count();
    if numbers.is_empty() { 0.0 } else { right as f64 / numbers.len() as f64 }
}

/// Share of the numbers in the answer that are the true one.
pub fn count(said: &str, truth: &str) -> f64 {
    share_of_numbers(said, truth)
}

/// Share of the numbers in the answer that are N of the truth's first `Paragraph N`; `None` if it has none.
pub fn retrieval(said: &str, truth: &str) -> Option<f64> {
    const BEFORE: &str = "Paragraph ";
    let numbered = truth.match_indices(BEFORE).map(|(at, _)| &truth[at + BEFORE.len()..]);
    let digits = |rest: &str| rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let number = numbered.map(|rest| &rest[..digits(rest)]).find(|number| !number.is_empty())?;
    Some(share_of_numbers(said, number))
}

/// Edit similarity of the answer's first line that is code (without `` ` ``, `#`, `//`): `1 - insertions and deletions over
/// all characters`, in whole percent.
pub fn code_similarity(said: &str, truth: &str) -> f64 {
    let is_code = |line: &&str| !line.contains('`') && !line.contains('#') && !line.contains("//");
    let line = said.trim_start_matches('\n').split('\n').find(is_code).unwrap_or("");
    if line == truth {
        return 1.0;
    }
    let (a, b): (Vec<char>, Vec<char>) = (line.chars().collect(), truth.chars().collect());
    if a.is_empty() || b.is_empty() {
        return 0.0;
    }
    let ratio = 2.0 * common_subsequence(&a, &b) as f64 / (a.len() + b.len()) as f64;
    (100.0 * ratio).round_ties_even() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn near(x: f64, y: f64) {
        assert!((x - y).abs() < 1e-7, "{x} is not {y}");
    }

    fn classes(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.into()).collect()
    }

    #[test]
    fn subsequences() {
        assert_eq!(common_subsequence(&['a', 'b', 'c', 'b', 'd', 'a', 'b'], &['b', 'd', 'c', 'a', 'b', 'a']), 4);
        assert_eq!(common_subsequence::<u32>(&[], &[1]), 0);
        near(share_found(&["fimi", "losu", "losu"], &["fimi", "maga", "losu"]), 2.0 / 3.0);
        near(share_found(&[1, 2, 3, 9], &[1, 2, 3]), 1.0);
        near(share_found::<u32>(&[], &[]), 1.0);
    }

    #[test]
    fn words_lose_case_punctuation_and_articles() {
        assert_eq!(normalised_words("The Cat's   an \"A-Team\", the end."), ["cats", "ateam", "end"]);
        // A quote that is not ASCII stays, and is no letter: the article beside it goes.
        assert_eq!(normalised_words("\u{201c}The end\u{201d} another"), ["\u{201c}", "end\u{201d}", "another"]);
    }

    #[test]
    fn qa_f1_by_hand() {
        // red fox jumps / red fox: 2 of 3 said, 2 of 2 true.
        near(qa_f1("The red fox jumps.", "a red fox"), 0.8);
        near(qa_f1("Paris", "paris!"), 1.0);
        near(qa_f1("London", "Paris"), 0.0);
        near(qa_f1("", "Paris"), 0.0);
        // A word counts as often as both have it: 1 of 3, 1 of 2.
        near(qa_f1("no no no", "no way"), 2.0 * (1.0 / 3.0) * 0.5 / (1.0 / 3.0 + 0.5));
    }

    #[test]
    fn rouge_l_by_hand() {
        // "the cat sat" / "the cat ran": 2 of 3 and 2 of 3.
        near(rouge_l("the cat sat", "the cat ran"), 2.0 / 3.0);
        // Different words only: {police killed the gunman} and {police kill the gunman}, order breaks one.
        near(rouge_l("police killed the gunman", "police kill the gunman"), 0.75);
        // "the gunman police killed": the longest common subsequence is two words.
        near(rouge_l("the gunman police killed", "police kill the gunman"), 0.5);
        // Two said sentences, one true one a b c d e: {a b} and {a c e} unite to 4 of 5; said are a b f g h c i e = 8.
        let (p, r) = (4.0 / 8.0, 4.0 / 5.0);
        near(rouge_l("a b f g h. a c h i e", "a b c d e"), 2.0 * p * r / (p + r));
        // A sentence of a space is one empty word: {One, "", two, three} said, {two, three, one} true, "two" common.
        near(rouge_l("One. . two three", "two. three one two"), 2.0 / 7.0);
        near(rouge_l("", "a"), 0.0);
        near(rouge_l("...", "a"), 0.0);
        near(rouge_l("a", "b"), 0.0);
    }

    #[test]
    fn classification_by_hand() {
        let all = classes(&["Date", "City", "Country", "Other location"]);
        near(classification("City", "City", &all), 1.0);
        near(classification("City or Country", "City", &all), 0.5);
        near(classification("Country", "City", &all), 0.0);
        near(classification("", "City", &all), 0.0);
        // "location" is a part of the true class, and does not count.
        near(classification("Other location", "Other location", &classes(&["location", "Other location"])), 1.0);
        // Of three parts that follow each other the second is overlooked.
        near(classification("a b c x", "a b c", &classes(&["a", "b", "c", "a b c"])), 0.5);
    }

    #[test]
    fn numbers_by_hand() {
        near(count("There are 12 paragraphs.", "12"), 1.0);
        near(count("12 or 13, I think 12", "12"), 2.0 / 3.0);
        near(count("twelve", "12"), 0.0);
        near(count("112", "12"), 0.0);
        near(retrieval("Paragraph 7", "Paragraph 7").unwrap(), 1.0);
        near(retrieval("7 or 17", "Paragraph 7").unwrap(), 0.5);
        near(retrieval("none", "Paragraph 7").unwrap(), 0.0);
        assert_eq!(retrieval("7", "the seventh"), None);
    }

    #[test]
    fn code_similarity_by_hand() {
        near(code_similarity("\nreturn x", "return x"), 1.0);
        // abcd / abxd: 3 of 4 characters each.
        near(code_similarity("abcd", "abxd"), 0.75);
        // Comments and fences are skipped; the line after them counts.
        near(code_similarity("```python\n# first\n// second\nabcd\nrest", "abxd"), 0.75);
        // 2 * 2 / 5 is 80 %; 2 / 3 is 67 %, rounded.
        near(code_similarity("abc", "ab"), 0.8);
        near(code_similarity("ab", "a"), 0.67);
        near(code_similarity("", "x"), 0.0);
        near(code_similarity("", ""), 1.0);
    }
}
