//! `eval longbench`: the English tasks of LongBench, as published.

use std::path::Path;

use serde_json::{Value, json};
use specache::chat::{ChatTemplate, Message};
use specache::error::{Error, Result};
use specache::eval;
use specache::eval::answer::{Limits, greedy};
use specache::eval::longbench::{Item, Task, default_max_length, halves, items, task, tasks_in};
use specache::kv::{KvMode, KvOptions};

use super::args::LongbenchArgs;
use super::{
    Items, Show, Subject, hash, measure, names, report, show_answer, some, template, unreadable, variant, variants_key,
};
use crate::cli::output::table;
use crate::cli::progress::{Progress, say};

/// A task and its questions.
struct Questions {
    name: String,
    task: &'static Task,
    items: Vec<Item>,
}

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with the arguments, the model, the data or the output file.
pub fn run(args: &LongbenchArgs) -> Result<()> {
    let variants = args.variants.options(&[KvMode::Full, KvMode::Kivi, KvMode::SpeCache])?;
    let questions = questions(args)?;
    let template = template(args.chat, &args.model.model)?;
    if let Some(max_length @ ..2) = args.max_length {
        return Err(Error::Usage(format!("--max-length {max_length}: at least 2 tokens are needed")));
    }
    let subject = Subject::load(&args.model, &variants, &args.results)?;
    subject.tokenizer()?;
    let positions = subject.engine.model().config.max_positions;
    let max_length = args.max_length.unwrap_or(default_max_length(positions).max(2));
    let answers = questions.iter().map(|q| q.task.max_tokens).max().unwrap_or(0);
    subject.check_length(max_length.saturating_add(answers))?;
    let total: usize = questions.iter().map(|q| q.items.len()).sum();
    let key = json!({
        "model": subject.identity(args.chat)?,
        "the data (--data)": hash(questions.iter().flat_map(|q| &q.items).map(item_text)),
        "--tasks": questions.iter().map(|q| q.name.as_str()).collect::<Vec<_>>(),
        "the number of items (--limit)": total,
        "--max-length": max_length,
        "--chat": args.chat,
        "--kv": variants_key(&variants),
    });
    let what = format!(
        "{} of {}, prompts of up to {max_length} tokens; {}",
        some(total, "item"),
        some(questions.len(), "task"),
        names(&variants)
    );
    let items = Items::begin("longbench", key, &args.results, total * variants.len(), &what)?;
    let (subject, scores) = measure(subject, items, |subject, items| {
        let asker = Asker { subject, template, max_length };
        questions.iter().map(|q| asker.ask_all(q, &variants, items)).collect::<Result<Vec<_>>>()
    })?;
    let full = variants.iter().position(|kv| kv.mode == KvMode::Full);
    if full.is_some_and(|full| scores.iter().all(|of_task| of_task[full].iter().all(|&score| score == 0.0))) {
        say(format_args!(
            "note: full scores nothing either, so the columns say nothing about the KV modes: try --chat, or a model that \
             can answer"
        ));
    }
    let text = table_of(&questions, &variants, &scores);
    let json = json!({
        "eval": "longbench", "model": subject.engine.model().name, "max_length": max_length, "chat": args.chat,
        "variants": (0..variants.len()).map(|v| variant_json(&variants[v], v, &questions, &scores)).collect::<Vec<_>>(),
    });
    report(&args.results, &json, &text)
}

/// All of an item, without doubt about where a field ends.
fn item_text(item: &Item) -> String {
    json!([item.id, item.context, item.input, item.answers, item.length, item.all_classes]).to_string()
}

fn questions(args: &LongbenchArgs) -> Result<Vec<Questions>> {
    if args.limit == Some(0) {
        return Err(Error::Usage("--limit 0: at least one item is needed".into()));
    }
    let found = |folder: &Path| if args.tasks.is_empty() { tasks_in(folder) } else { Ok(args.tasks.clone()) };
    let mut progress = Progress::new();
    progress.announce(format_args!("reading {}", args.data.display()));
    let mut all: Vec<Questions> = Vec::new();
    for name in found(&args.data)? {
        if all.iter().any(|q| q.name == name) {
            return Err(Error::Usage(format!("--tasks: {name} is there twice")));
        }
        progress.show(format_args!("reading {name}"));
        let (task, mut items) = (task(&name)?, items(&args.data, &name)?);
        items.truncate(args.limit.unwrap_or(usize::MAX));
        all.push(Questions { name, task, items });
    }
    Ok(all)
}

struct Asker<'a> {
    subject: &'a Subject,
    template: Option<ChatTemplate>,
    max_length: usize,
}

impl Asker<'_> {
    /// `[variant][item]` scores.
    fn ask_all(&self, questions: &Questions, variants: &[KvOptions], items: &mut Items) -> Result<Vec<Vec<f64>>> {
        let mut scores = vec![Vec::new(); variants.len()];
        for item in &questions.items {
            for (kv, scores) in variants.iter().zip(&mut scores) {
                let name = format!("{} {}, {}", questions.name, item.id, eval::name(kv));
                let result = items.item(&name, |show| self.ask(questions.task, item, *kv, show))?;
                scores.push(result["score"].as_f64().ok_or_else(|| unreadable(&name))?);
            }
        }
        Ok(scores)
    }

    fn ask(&self, task: &Task, item: &Item, kv: KvOptions, show: Show) -> Result<Value> {
        let (engine, tokenizer) = (&self.subject.engine, self.subject.tokenizer()?);
        let prompt = self.prompt(task, item)?;
        let mut stop = engine.model().config.eos_token_ids.clone();
        if task.one_line {
            stop.extend(tokenizer.encode("\n", false)?.last());
        }
        let limits = Limits { most: task.max_tokens, stop, not_empty: task.one_line };
        let said = greedy(engine, kv, &prompt, &limits, &mut |at| show_answer(show, prompt.len(), at))?;
        let said = tokenizer.decode(&said)?;
        Ok(json!({ "tokens": prompt.len(), "pred": said, "score": task.score(&said, item) }))
    }

    /// The prompt's ids: cut in its middle as text, then put into the chat template, then into tokens again, in the order of
    /// the published script.
    fn prompt(&self, task: &Task, item: &Item) -> Result<Vec<u32>> {
        let tokenizer = self.subject.tokenizer()?;
        let mut text = task.prompt(item);
        let ids = tokenizer.encode(&text, true)?;
        if let Some((head, tail)) = halves(&ids, self.max_length) {
            text = tokenizer.decode(head)? + &tokenizer.decode(tail)?;
        }
        match self.template.as_ref().filter(|_| !task.plain) {
            Some(template) => {
                tokenizer.encode(&template.render(&[Message { role: "user", content: &text }], true)?, false)
            }
            None => tokenizer.encode(&text, true),
        }
    }
}

/// As published: percent, the mean over the items.
fn percent(scores: &[f64]) -> Option<f64> {
    (!scores.is_empty()).then(|| 100.0 * scores.iter().sum::<f64>() / scores.len() as f64)
}

/// Means over all tasks, each of the same weight.
fn average(scores: &[Vec<Vec<f64>>], v: usize) -> Option<f64> {
    let means: Vec<f64> = scores.iter().filter_map(|of_task| percent(&of_task[v])).collect();
    percent(&means).map(|x| x / 100.0)
}

fn table_of(questions: &[Questions], variants: &[KvOptions], scores: &[Vec<Vec<f64>>]) -> String {
    let show = |x: Option<f64>| x.map_or("n/a".to_string(), |x| format!("{x:.2}"));
    let names: Vec<String> = variants.iter().map(eval::name).collect();
    let header: Vec<&str> = ["task", "items"].into_iter().chain(names.iter().map(String::as_str)).collect();
    let mut rows: Vec<Vec<String>> = questions
        .iter()
        .zip(scores)
        .map(|(q, of_task)| {
            let cells = of_task.iter().map(|of_variant| show(percent(of_variant)));
            [q.name.clone(), q.items.len().to_string()].into_iter().chain(cells).collect()
        })
        .collect();
    if questions.len() > 1 {
        let items: usize = questions.iter().map(|q| q.items.len()).sum();
        let means = (0..variants.len()).map(|v| show(average(scores, v)));
        rows.push(["mean of the tasks".to_string(), items.to_string()].into_iter().chain(means).collect());
    }
    table(&header, &rows)
}

/// Scores by words of context, as LongBench-E reports them.
fn by_length(questions: &Questions, scores: &[f64]) -> Value {
    let between = |from: usize, to: usize| {
        let pairs = questions.items.iter().zip(scores).filter(|(item, _)| (from..to).contains(&item.length));
        percent(&pairs.map(|(_, score)| *score).collect::<Vec<_>>())
    };
    json!({ "0-4k": between(0, 4000), "4-8k": between(4000, 8000), "8k+": between(8000, usize::MAX) })
}

fn variant_json(kv: &KvOptions, v: usize, questions: &[Questions], scores: &[Vec<Vec<f64>>]) -> Value {
    let tasks = questions.iter().zip(scores).map(|(q, of_task)| {
        json!({
            "task": q.name,
            "items": q.items.len(),
            "score": percent(&of_task[v]),
            "by_length": q.name.ends_with("_e").then(|| by_length(q, &of_task[v])),
        })
    });
    let mut row = variant(kv);
    row["mean"] = json!(average(scores, v));
    row["tasks"] = json!(tasks.collect::<Vec<_>>());
    row
}
