//! `eval needle`: is what was planted found again?

use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use specache::chat::{ChatTemplate, Message};
use specache::error::{Error, Result};
use specache::eval;
use specache::eval::answer::{Limits, greedy};
use specache::eval::metrics::share_found;
use specache::eval::needle::{Haystack, Needle, score};
use specache::eval::picture::{Heatmap, Panel};
use specache::kv::{KvMode, KvOptions};

use super::args::NeedleArgs;
use super::{
    Items, Show, Subject, hash, measure, names, plot_file, report_drawn, show_answer, some, template, unreadable,
    variant, variants_key,
};
use crate::cli::input;
use crate::cli::output::table;
use crate::cli::progress::{Progress, is_dumb, say};

/// Lengths unless the user says otherwise.
const LENGTHS: [usize; 3] = [1000, 2000, 4000];
/// Longest prompt; no model goes as far, and a text is made and cut into tokens several times to find its length.
const MOST_TOKENS: usize = 4 << 20;
/// More depths than this become rows of ten percent each.
const MOST_ROWS: usize = 21;

/// What is expected.
enum Expected {
    Text(String),
    Ids(Vec<u32>),
}

/// One prompt.
struct Case {
    /// As it was asked for.
    length: usize,
    /// Percent.
    depth: f64,
    /// Tells cases of one length and depth apart.
    index: usize,
    ids: Vec<u32>,
    expected: Expected,
    most: usize,
}

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with the arguments, the model, the texts or the output files.
pub fn run(args: &NeedleArgs) -> Result<()> {
    let variants = args.variants.options(&[KvMode::Full, KvMode::Kivi, KvMode::SpeCache])?;
    if args.n_predict == Some(0) {
        return Err(Error::Usage("-n 0: at least one token must be generated".into()));
    }
    let plot = plot_file(args.plot.as_ref())?;
    // What needs no model comes first, so that mistakes show before one is loaded.
    let given = args.prompts.as_deref().map_or_else(|| Given::planted(args), Given::ready)?;
    let subject = Subject::load(&args.model, &variants, &args.results)?;
    let cases = match given {
        Given::Ready(prompts) => ready_cases(args, prompts, &subject)?,
        Given::Planted { needle, haystack, template } => planted_cases(args, &needle, &haystack, template, &subject)?,
    };
    let most = |of: fn(&Case) -> usize| cases.iter().map(of).max().unwrap_or(0);
    let (longest, answer) = (most(|case| case.ids.len()), most(|case| case.most));
    let expected = cases.iter().map(|case| match &case.expected {
        Expected::Text(text) => text.as_bytes(),
        Expected::Ids(ids) => bytemuck::cast_slice(ids),
    });
    let key = json!({
        "model": subject.identity(args.chat)?,
        "the text (--haystack, --needle, --question, --prompts)": hash(cases.iter().map(|case| bytemuck::cast_slice::<_, u8>(&case.ids))),
        "the answer (--answer, --prompts)": hash(expected),
        "--lengths": cases.iter().map(|case| case.length).collect::<BTreeSet<_>>(),
        "--depths": distinct(&cases, |case| case.depth),
        "-n": answer,
        "--kv": variants_key(&variants),
    });
    let prompts = some(cases.len(), "prompt");
    let what = format!("{prompts} of up to {longest} tokens, answers of up to {answer}; {}", names(&variants));
    let items = Items::begin("needle", key, &args.results, cases.len() * variants.len(), &what)?;
    let (subject, scores) = measure(subject, items, |subject, items| ask_all(subject, &cases, &variants, items))?;
    let full = variants.iter().position(|kv| kv.mode == KvMode::Full);
    if full.is_some_and(|full| scores[full].iter().all(|&score| score == 0.0)) {
        say(format_args!(
            "note: full finds nothing either, so the rows say nothing about the KV modes: try another needle, --chat, or \
             shorter prompts"
        ));
    }
    let map = heatmap(&subject.engine.model().name, &cases, &variants, &scores);
    let json = results_json(&subject, &cases, &variants, &scores);
    report_drawn(&args.results, &json, &text(&cases, &variants, &scores, &map), plot, || map.svg())
}

/// `[variant][case]` scores.
fn ask_all(subject: &Subject, cases: &[Case], variants: &[KvOptions], items: &mut Items) -> Result<Vec<Vec<f64>>> {
    let mut scores = vec![Vec::new(); variants.len()];
    for case in cases {
        for (kv, scores) in variants.iter().zip(&mut scores) {
            let index = if case.index > 0 { format!(" #{}", case.index) } else { String::new() };
            let name = format!("{} tokens, depth {} %{index}, {}", case.length, rounded(case.depth), eval::name(kv));
            let result = items.item(&name, |show| ask(subject, case, *kv, show))?;
            scores.push(result["score"].as_f64().ok_or_else(|| unreadable(&name))?);
        }
    }
    Ok(scores)
}

/// A depth as names show it.
fn rounded(depth: f64) -> f64 {
    (depth * 100.0).round() / 100.0
}

fn ask(subject: &Subject, case: &Case, kv: KvOptions, show: Show) -> Result<Value> {
    let engine = &subject.engine;
    let stop = match case.expected {
        Expected::Text(_) => engine.model().config.eos_token_ids.clone(),
        Expected::Ids(_) => Vec::new(),
    };
    let limits = Limits { most: case.most, stop, not_empty: false };
    let said = greedy(engine, kv, &case.ids, &limits, &mut |at| show_answer(show, case.ids.len(), at))?;
    Ok(match &case.expected {
        Expected::Ids(ids) => json!({ "tokens": case.ids.len(), "said": said, "score": share_found(&said, ids) }),
        Expected::Text(answer) => {
            let text = subject.tokenizer()?.decode(&said)?;
            let score = score(&text, answer);
            json!({ "tokens": case.ids.len(), "said": text, "score": score })
        }
    })
}

/// What the prompts are made of.
enum Given {
    Ready(Vec<Ready>),
    Planted { needle: Needle, haystack: String, template: Option<ChatTemplate> },
}

impl Given {
    fn planted(args: &NeedleArgs) -> Result<Given> {
        let usage = |what: String| Err(Error::Usage(what));
        let Some(file) = &args.haystack else { return usage("no haystack: give --haystack FILE".into()) };
        let needle = match (&args.needle, &args.question, &args.answer) {
            (Some(needle), Some(question), Some(answer)) => {
                Needle { needle: needle.clone(), question: question.clone(), answer: answer.clone() }
            }
            _ => Needle::default(),
        };
        if eval::metrics::normalised_words(&needle.answer).is_empty() {
            return usage("--answer: has no words that could be found".into());
        }
        if args.depths.is_empty() {
            return usage("--depths: at least one is needed".into());
        }
        if let Some(depth) = args.depths.iter().find(|depth| !(0.0..=100.0).contains(*depth)) {
            return usage(format!("--depths {depth}: must be from 0 to 100 percent"));
        }
        if let Some(length) = args.lengths.iter().find(|&&length| length > MOST_TOKENS) {
            return usage(format!("--lengths {length}: at most {MOST_TOKENS} tokens are supported"));
        }
        let haystack = input::text("--haystack", file)?;
        Ok(Given::Planted { needle, haystack, template: template(args.chat, &args.model.model)? })
    }

    fn ready(file: &Path) -> Result<Given> {
        let wrong = |what: String| Error::Usage(format!("--prompts {}: {what}", file.display()));
        let ready: Vec<Ready> = serde_json::from_slice(&input::read_for("--prompts", file)?).map_err(|e| {
            wrong(format!("not a JSON array of objects with length, ids, answer and depth or index ({e})"))
        })?;
        if ready.is_empty() {
            return Err(wrong("the list is empty".into()));
        }
        for (i, prompt) in ready.iter().enumerate() {
            prompt.percent(&ready).map_err(|what| wrong(format!("prompt {i}{what}")))?;
            if prompt.ids.is_empty() || prompt.answer.is_empty() {
                return Err(wrong(format!("prompt {i}: `ids` and `answer` need a token each")));
            }
        }
        Ok(Given::Ready(ready))
    }
}

/// Prompts made of a haystack.
fn planted_cases(
    args: &NeedleArgs,
    needle: &Needle,
    haystack: &str,
    template: Option<ChatTemplate>,
    subject: &Subject,
) -> Result<Vec<Case>> {
    let tokenizer = subject.tokenizer()?;
    let mut progress = Progress::new();
    progress.announce("cutting the haystack into tokens");
    let haystack = Haystack::new(tokenizer, haystack)?;
    let answer = tokenizer.encode(&needle.answer, false)?.len();
    let most = args.n_predict.unwrap_or(answer + 16);
    let limit = subject.engine.model().config.max_positions;
    let fitting = || LENGTHS.into_iter().filter(|length| length.saturating_add(most) <= limit).collect::<Vec<_>>();
    let lengths = match (args.lengths.is_empty(), fitting()) {
        (false, _) => args.lengths.clone(),
        // A model for short texts is asked as far as it goes.
        (true, none) if none.is_empty() => vec![limit.saturating_sub(most)],
        (true, fitting) => fitting,
    };
    let longest = lengths.iter().copied().max().unwrap_or(0);
    subject.check_length(longest.saturating_add(most))?;
    if longest > haystack.tokens() {
        let tokens = haystack.tokens();
        say(format_args!("the haystack has about {tokens} tokens; for {longest} it begins again"));
    }
    let ids = |text: &str| match &template {
        Some(template) => tokenizer.encode(&template.render(&[Message { role: "user", content: text }], true)?, false),
        None => tokenizer.encode(text, true),
    };
    let mut cases = Vec::new();
    for &length in &lengths {
        for &depth in &args.depths {
            let (n, of) = (cases.len() + 1, lengths.len() * args.depths.len());
            progress.show(format_args!("making prompt {n} of {of}, {length} tokens"));
            let ids = haystack.prompt(needle, length, depth / 100.0, ids)?;
            let index = number_among(&cases, length, depth);
            cases.push(Case { length, depth, index, ids, expected: Expected::Text(needle.answer.clone()), most });
        }
    }
    Ok(cases)
}

/// How many of the cases so far have this length and depth, as names show it.
fn number_among(cases: &[Case], length: usize, depth: f64) -> usize {
    cases.iter().filter(|c| c.length == length && rounded(c.depth) == rounded(depth)).count()
}

/// A prompt of a file.
#[derive(Deserialize)]
struct Ready {
    length: usize,
    ids: Vec<u32>,
    answer: Vec<u32>,
    /// Percent.
    depth: Option<f64>,
    /// Where there is no depth: prompt i of the n of its length is at `(i + 0.5) / n`.
    index: Option<usize>,
}

impl Ready {
    /// Its depth, among all of the file.
    fn percent(&self, all: &[Ready]) -> Result<f64, String> {
        let of = all.iter().filter(|other| other.length == self.length).count();
        match (self.depth, self.index) {
            (Some(depth), _) if (0.0..=100.0).contains(&depth) => Ok(depth),
            (Some(depth), _) => Err(format!(": depth {depth} must be from 0 to 100 percent")),
            (None, Some(index)) if index < of => Ok((index as f64 + 0.5) / of as f64 * 100.0),
            (None, Some(index)) => Err(format!(": index {index} of {of} of its length")),
            (None, None) => Err(" has neither depth nor index".into()),
        }
    }
}

fn ready_cases(args: &NeedleArgs, ready: Vec<Ready>, subject: &Subject) -> Result<Vec<Case>> {
    let depths = ready.iter().map(|prompt| prompt.percent(&ready)).collect::<Result<Vec<f64>, String>>();
    let depths = depths.map_err(Error::Usage)?;
    let mut cases: Vec<Case> = Vec::new();
    for (i, (prompt, depth)) in ready.into_iter().zip(depths).enumerate() {
        for ids in [&prompt.ids, &prompt.answer] {
            input::check_ids(&format!("--prompts: prompt {i}"), ids, subject.engine.model().config.vocab_size)?;
        }
        let index = number_among(&cases, prompt.length, depth);
        let most = args.n_predict.unwrap_or(prompt.answer.len());
        let Ready { length, ids, answer, .. } = prompt;
        cases.push(Case { length, depth, index, ids, expected: Expected::Ids(answer), most });
    }
    let longest = cases.iter().map(|case| case.ids.len().saturating_add(case.most)).max().unwrap_or(0);
    subject.check_length(longest).map(|()| cases)
}

/// The values of `key` that differ, ascending.
fn distinct(cases: &[Case], key: impl Fn(&Case) -> f64) -> Vec<f64> {
    let mut values: Vec<f64> = cases.iter().map(key).collect();
    values.sort_by(f64::total_cmp);
    values.dedup();
    values
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.fold((0.0, 0u32), |(sum, n), x| (sum + x, n + 1));
    (n > 0).then(|| sum / f64::from(n))
}

fn heatmap(model: &str, cases: &[Case], variants: &[KvOptions], scores: &[Vec<f64>]) -> Heatmap {
    let (lengths, depths) = (distinct(cases, |c| c.length as f64), distinct(cases, |c| c.depth));
    // Rows [from, to], of which only the last has its end.
    let rows: Vec<(String, f64, f64)> = if depths.len() <= MOST_ROWS {
        depths.iter().map(|&d| (format!("{} %", rounded(d)), d, d)).collect()
    } else {
        let ten = |i: u32| (f64::from(i) * 10.0, f64::from(i + 1) * 10.0);
        (0..10).map(ten).map(|(from, to)| (format!("{from}-{to} %"), from, to)).collect()
    };
    let inside =
        |depth: f64, from: f64, to: f64| from <= depth && (depth < to || depth == to && (from == to || to == 100.0));
    let cell = |scores: &[f64], length: f64, from: f64, to: f64| {
        let pairs = cases.iter().zip(scores).filter(|(c, _)| c.length as f64 == length && inside(c.depth, from, to));
        mean(pairs.map(|(_, score)| *score))
    };
    let panels = variants.iter().zip(scores).map(|(kv, scores)| {
        let whole = mean(scores.iter().copied()).map_or(String::new(), |x| format!(", mean {x:.3}"));
        let row = |(_, from, to): &(String, f64, f64)| lengths.iter().map(|&l| cell(scores, l, *from, *to)).collect();
        Panel { title: eval::name(kv) + &whole, cells: rows.iter().map(row).collect() }
    });
    Heatmap {
        title: format!("Needle in a haystack: {model}"),
        row_axis: "depth of the needle".into(),
        column_axis: "tokens".into(),
        columns: lengths.iter().map(|length| format!("{length}")).collect(),
        panels: panels.collect(),
        rows: rows.into_iter().map(|(name, ..)| name).collect(),
    }
}

/// The mean score, and how many were found whole, of a variant at a length.
fn at_length(cases: &[Case], scores: &[f64], length: f64) -> (f64, usize, usize) {
    let of: Vec<f64> = cases.iter().zip(scores).filter(|(c, _)| c.length as f64 == length).map(|(_, s)| *s).collect();
    (mean(of.iter().copied()).unwrap_or(0.0), of.iter().filter(|&&s| s >= 1.0).count(), of.len())
}

fn text(cases: &[Case], variants: &[KvOptions], scores: &[Vec<f64>], map: &Heatmap) -> String {
    let wanted = std::env::var_os("NO_COLOR").is_none() && !is_dumb();
    let coloured = wanted && std::io::IsTerminal::is_terminal(&std::io::stdout());
    let lengths = distinct(cases, |c| c.length as f64);
    let mut header = vec!["KV".to_string()];
    header.extend(lengths.iter().map(|length| format!("{length} tokens (whole)")));
    let rows = variants.iter().zip(scores).map(|(kv, scores)| {
        let cells = lengths.iter().map(|&length| {
            let (mean, whole, of) = at_length(cases, scores, length);
            format!("{mean:.3} ({whole}/{of})")
        });
        [eval::name(kv)].into_iter().chain(cells).collect::<Vec<String>>()
    });
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let table = table(&header, &rows.collect::<Vec<_>>());
    let legend = "Scores: the share of the answer that is found, in order; in brackets the prompts with all of it.";
    format!("{}{table}\n{legend}\n", map.text(coloured))
}

fn results_json(subject: &Subject, cases: &[Case], variants: &[KvOptions], scores: &[Vec<f64>]) -> Value {
    let case = |(case, score): (&Case, &f64)| json!({ "length": case.length, "depth": case.depth, "tokens": case.ids.len(), "score": score });
    let rows = variants.iter().zip(scores).map(|(kv, scores)| {
        let mut row = variant(kv);
        row["score"] = json!(mean(scores.iter().copied()));
        row["whole"] = json!(scores.iter().filter(|&&s| s >= 1.0).count());
        row["prompts"] = json!(scores.len());
        row["cells"] = json!(cases.iter().zip(scores).map(case).collect::<Vec<_>>());
        row
    });
    json!({ "eval": "needle", "model": subject.engine.model().name, "variants": rows.collect::<Vec<_>>() })
}
