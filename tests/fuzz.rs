//! What reads a stranger's files, on the seeds of tests/fixtures/fuzz/ and on mutations of them. `tools/fuzz.sh` runs the same
//! with libFuzzer; an input that it finds becomes a seed.
//!
//! Three seconds a format; `SPECACHE_FUZZ_SECONDS=600` for longer. `SPECACHE_FUZZ_SEED` repeats a run that failed. The input
//! that is being tried lies in `fuzz-FORMAT` in the folder of temporary files that cargo gives to tests.

mod common;
#[path = "common/formats.rs"]
mod formats;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use common::fixture;
use common::tiny::Random;
use formats::Format;

/// Replays the seeds, then mutations of them until the time is over.
fn fuzz(format: &Format) {
    let last = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}", format.name));
    let try_one = |input: &[u8]| {
        fs::write(&last, input).unwrap();
        formats::run(format, input);
    };
    let mut files: Vec<_> =
        fs::read_dir(fixture("fuzz").join(format.name)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let seeds: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).unwrap()).collect();
    assert!(seeds.len() >= 3, "seeds of {}", format.name);
    seeds.iter().for_each(|seed| try_one(seed));

    let variable = |name: &str, default: u64| std::env::var(name).map_or(default, |v| v.parse().unwrap());
    let seed = variable("SPECACHE_FUZZ_SEED", std::process::id().into());
    let end = Instant::now() + Duration::from_secs(variable("SPECACHE_FUZZ_SECONDS", 3));
    println!("{}: SPECACHE_FUZZ_SEED={seed}, the input is in {}", format.name, last.display());
    let mut mutator = Mutator { random: Random(seed), words: words() };
    let mut tried = 0u64;
    while Instant::now() < end {
        let mut input = seeds[mutator.below(seeds.len())].clone();
        for _ in 0..=mutator.below(4) {
            let other = mutator.below(seeds.len());
            mutator.mutate(&mut input, &seeds[other]);
        }
        try_one(&input);
        tried += 1;
    }
    println!("{}: {tried} mutations", format.name);
}

/// The words of the formats: a line each, in quotes.
fn words() -> Vec<Vec<u8>> {
    let text = fs::read_to_string(fixture("fuzz/words.dict")).unwrap();
    let words = text.lines().filter_map(|line| line.strip_prefix('"')?.strip_suffix('"'));
    words.map(|word| word.replace("\\\\", "\\").into_bytes()).collect()
}

struct Mutator {
    random: Random,
    words: Vec<Vec<u8>>,
}

impl Mutator {
    fn below(&mut self, n: usize) -> usize {
        (self.random.bits() % n.max(1) as u64) as usize
    }

    /// Two places, in order, not far from each other as a rule.
    fn range(&mut self, len: usize) -> std::ops::Range<usize> {
        let start = self.below(len + 1);
        let most = if self.below(8) == 0 { len } else { 24 };
        start..(start + self.below(most)).min(len)
    }

    fn mutate(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        let range = self.range(input.len());
        match self.below(9) {
            0 if !input.is_empty() => {
                let at = self.below(input.len());
                input[at] ^= 1 << self.below(8);
            }
            1 => drop(input.drain(range)),
            2 => {
                let piece = input[range.clone()].to_vec();
                let most = if self.below(20) == 0 { 500 } else { 3 };
                let copies = 1 + self.below(most);
                drop(input.splice(range, piece.repeat(copies)));
            }
            3 | 4 => {
                let word = self.below(self.words.len());
                drop(input.splice(range, self.words[word].clone()));
            }
            5 => {
                let from = self.range(other.len());
                drop(input.splice(range, other[from].iter().copied()));
            }
            _ => self.replace_a_value(input),
        }
    }

    /// One number, string, list or word of a JSON-like text becomes another of any kind.
    fn replace_a_value(&mut self, input: &mut Vec<u8>) {
        const VALUES: [&str; 16] = [
            "null",
            "true",
            "[]",
            "{}",
            "\"\"",
            "\"x\"",
            "-1",
            "0",
            "1",
            "0.5",
            "1e308",
            "-1e-308",
            "4294967295",
            "9223372036854775807",
            "18446744073709551615",
            "[[0,1],[1]]",
        ];
        let begins: Vec<usize> = (1..input.len()).filter(|&i| matches!(input[i - 1], b':' | b'[' | b',')).collect();
        if begins.is_empty() {
            return;
        }
        let start = begins[self.below(begins.len())];
        let len = input[start..].iter().position(|b| matches!(b, b',' | b']' | b'}')).unwrap_or(0);
        let value = VALUES[self.below(VALUES.len())];
        drop(input.splice(start..start + len, value.bytes()));
    }
}

#[test]
fn config() {
    fuzz(&formats::CONFIG);
}

#[test]
fn weights() {
    fuzz(&formats::WEIGHTS);
}

#[test]
fn index() {
    fuzz(&formats::INDEX);
}

#[test]
fn tokenizer() {
    fuzz(&formats::TOKENIZER);
}

#[test]
fn ids() {
    fuzz(&formats::IDS);
}

#[test]
fn chat_template() {
    fuzz(&formats::CHAT_TEMPLATE);
}

#[test]
fn longbench() {
    fuzz(&formats::LONGBENCH);
}

/// Each format has seeds and a target for libFuzzer.
#[test]
fn every_format_is_fuzzed() {
    for format in formats::ALL {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fuzz/targets/{}.rs", format.name));
        let text = fs::read_to_string(&target).unwrap();
        assert!(text.contains(&format!("formats::{}", format.name.to_uppercase())), "{}", target.display());
        assert!(fixture("fuzz").join(format.name).is_dir(), "{}", format.name);
    }
}
