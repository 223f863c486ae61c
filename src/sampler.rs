//! The next token from logits: repeat penalty, temperature, top-k, top-p, min-p and a seeded draw, in the order and
//! with the definitions of Hugging Face transformers.

use std::cmp::Ordering;

use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;

use crate::error::{Error, Result};
use crate::model::GenerationConfig;

/// How to choose the next token. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 takes the argmax.
    pub temperature: f32,
    /// Keep the k most likely tokens (and those that tie with the k-th); 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of most likely tokens whose probability reaches p; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens below this share of the most likely token's probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in the history; 1 changes nothing.
    pub repeat_penalty: f32,
    /// The same seed draws the same tokens.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        SamplingOptions { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repeat_penalty: 1.0, seed: 0 }
    }
}

/// What the command line says about sampling. `None`: it does not.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingOverrides {
    /// `--temp`.
    pub temperature: Option<f32>,
    /// `--top-k`.
    pub top_k: Option<usize>,
    /// `--top-p`.
    pub top_p: Option<f32>,
    /// `--min-p`.
    pub min_p: Option<f32>,
    /// `--repeat-penalty`.
    pub repeat_penalty: Option<f32>,
    /// `--seed`.
    pub seed: Option<u64>,
}

impl SamplingOptions {
    /// The command line wins over `generation_config.json`, which wins over the defaults. A model whose file does not
    /// say `"do_sample": true` is greedy unless `--temp` is given.
    ///
    /// # Errors
    /// As [`SamplingOptions::validate`].
    pub fn from_layers(cli: &SamplingOverrides, file: &GenerationConfig) -> Result<SamplingOptions> {
        let default = SamplingOptions::default();
        let file_temperature = match file.do_sample {
            Some(true) => file.temperature.unwrap_or(1.0),
            _ => default.temperature,
        };
        let options = SamplingOptions {
            temperature: cli.temperature.unwrap_or(file_temperature),
            top_k: cli.top_k.or(file.top_k).unwrap_or(default.top_k),
            top_p: cli.top_p.or(file.top_p).unwrap_or(default.top_p),
            min_p: cli.min_p.or(file.min_p).unwrap_or(default.min_p),
            repeat_penalty: cli.repeat_penalty.or(file.repetition_penalty).unwrap_or(default.repeat_penalty),
            seed: cli.seed.unwrap_or(default.seed),
        };
        options.validate()?;
        Ok(options)
    }

    /// Checks every option's range.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the option and its range.
    pub fn validate(&self) -> Result<()> {
        let check = |option: &str, value: f32, valid: bool, range: &str| match valid && value.is_finite() {
            true => Ok(()),
            false => Err(Error::Usage(format!("{option} {value}: must be a number {range}"))),
        };
        check("--temp", self.temperature, self.temperature >= 0.0, "of at least 0 (0: greedy)")?;
        check("--top-p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1 (1: off)")?;
        check("--min-p", self.min_p, (0.0..1.0).contains(&self.min_p), "of at least 0 and below 1 (0: off)")?;
        check("--repeat-penalty", self.repeat_penalty, self.repeat_penalty > 0.0, "above 0 (1: off)")
    }
}

/// A token that may be drawn.
#[derive(Clone, Copy)]
struct Candidate {
    id: u32,
    /// Logit after penalty and temperature.
    score: f32,
    /// `exp(score - best score)`: the probability up to a common factor.
    weight: f64,
}

/// Chooses tokens. Holds the random state and scratch memory, so one per sequence.
#[derive(Clone)]
pub struct Sampler {
    options: SamplingOptions,
    rng: Pcg64Mcg,
    scores: Vec<f32>,
    scratch: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler at the start of its seed's random sequence.
    ///
    /// # Errors
    /// As [`SamplingOptions::validate`].
    pub fn new(options: SamplingOptions) -> Result<Sampler> {
        options.validate()?;
        let rng = Pcg64Mcg::seed_from_u64(options.seed);
        Ok(Sampler { options, rng, scores: Vec::new(), scratch: Vec::new(), candidates: Vec::new() })
    }

    /// The options in use.
    pub fn options(&self) -> &SamplingOptions {
        &self.options
    }

    /// Whether it always takes the highest logit.
    pub fn is_argmax(&self) -> bool {
        self.options.temperature == 0.0 && self.options.repeat_penalty == 1.0
    }

    /// The random number in [0, 1) of the next token, drawn where the logits are; none is used up for a greedy one.
    pub(crate) fn next_random(&mut self) -> f64 {
        if self.options.temperature == 0.0 { 0.0 } else { uniform(&mut self.rng) }
    }

    /// Chooses the next token. `history` are the tokens that the repeat penalty applies to, prompt included.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a logit is NaN or +inf, or all are -inf (a single -inf only forbids its token).
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32> {
        check_finite(logits)?;
        let greedy = self.options.temperature == 0.0;
        if self.is_argmax() {
            return Ok(argmax(logits));
        }
        self.scores.clear();
        self.scores.extend_from_slice(logits);
        penalise(&mut self.scores, logits, history, self.options.repeat_penalty);
        if greedy {
            return Ok(argmax(&self.scores));
        }
        self.fill_candidates();
        keep_top_p(&mut self.candidates, self.options.top_p);
        let min_p = f64::from(self.options.min_p);
        // The best candidate has weight 1.
        self.candidates.retain(|c| c.weight >= min_p);
        Ok(draw(&self.candidates, uniform(&mut self.rng)))
    }

    /// Temperature and top-k: scores become candidates in the order of their ids.
    fn fill_candidates(&mut self) {
        // Divided in f64 and after the best is subtracted, so that a tiny temperature cannot overflow.
        let best = self.scores[argmax(&self.scores) as usize];
        let least = kth_largest(&self.scores, self.options.top_k, &mut self.scratch);
        let temperature = f64::from(self.options.temperature);
        let weigh = |score: f32| ((f64::from(score) - f64::from(best)) / temperature).exp();
        self.candidates.clear();
        let kept = (0..).zip(&self.scores).filter(|&(_, &score)| score >= least && score > f32::NEG_INFINITY);
        self.candidates.extend(kept.map(|(id, &score)| Candidate { id, score, weight: weigh(score) }));
    }
}

/// The index of the largest number, the lower one of equals. NaN is never the largest; 0 for an empty slice.
pub fn argmax(xs: &[f32]) -> u32 {
    // Lanes without a carried branch: the compiler turns them into vector maxima.
    const LANES: usize = 16;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = xs.as_chunks::<LANES>();
    for chunk in chunks {
        for (m, &x) in lanes.iter_mut().zip(chunk) {
            *m = if x > *m { x } else { *m };
        }
    }
    let best = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
    xs.iter().position(|&x| x == best).unwrap_or(0) as u32
}

fn check_finite(logits: &[f32]) -> Result<()> {
    let bad = |x: f32| x.is_nan() || x == f32::INFINITY;
    if let Some(i) = logits.iter().position(|&x| bad(x)) {
        return Err(Error::NotFinite(format!("the logit of token {i} is {}; no token can be chosen", logits[i])));
    }
    if logits.iter().all(|&x| x == f32::NEG_INFINITY) {
        return Err(Error::NotFinite(format!("all {} logits are -inf; no token can be chosen", logits.len())));
    }
    Ok(())
}

/// Once per token, however often it occurred: it always starts from the original logit.
fn penalise(scores: &mut [f32], logits: &[f32], history: &[u32], penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    for &id in history {
        if let Some(&logit) = logits.get(id as usize) {
            // Clamped, so that an extreme penalty cannot make an infinity out of a finite logit.
            let score = if logit < 0.0 { logit * penalty } else { logit / penalty };
            scores[id as usize] = if logit.is_finite() { score.clamp(f32::MIN, f32::MAX) } else { logit };
        }
    }
}

/// The k-th largest score, or -inf where k = 0 or there are no more than k.
fn kth_largest(scores: &[f32], k: usize, scratch: &mut Vec<f32>) -> f32 {
    if k == 0 || k >= scores.len() {
        return f32::NEG_INFINITY;
    }
    scratch.clear();
    scratch.extend_from_slice(scores);
    *scratch.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// Keeps the most likely candidates up to and with the one at which the probability reaches `top_p`; sorts them.
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f32) {
    if top_p >= 1.0 {
        return;
    }
    let top_p = f64::from(top_p);
    let total: f64 = candidates.iter().map(|c| c.weight).sum();
    // All that are less likely than this add up to less than 1 - p, so none of them is needed: sort only the others.
    let least = total * (1.0 - top_p) / candidates.len() as f64;
    candidates.retain(|c| c.weight >= least);
    candidates.sort_unstable_by(more_likely_first);
    let mut before = 0.0;
    let kept = candidates.iter().take_while(|c| {
        let needed = before < top_p * total;
        before += c.weight;
        needed
    });
    let kept = kept.count();
    candidates.truncate(kept);
}

fn more_likely_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.score.total_cmp(&a.score).then(a.id.cmp(&b.id))
}

/// The candidate at which the running sum of weights passes `u` (in [0, 1)) of the total.
fn draw(candidates: &[Candidate], u: f64) -> u32 {
    let total: f64 = candidates.iter().map(|c| c.weight).sum();
    let mut rest = u * total;
    for c in candidates {
        rest -= c.weight;
        if rest < 0.0 {
            return c.id;
        }
    }
    // Rounding may leave a remainder; the last token that has any weight takes it.
    candidates.iter().rfind(|c| c.weight > 0.0).map_or(0, |c| c.id)
}

/// A number in [0, 1) with 53 random bits.
fn uniform(rng: &mut Pcg64Mcg) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}
