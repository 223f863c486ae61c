//! LongBench (Bai et al., ACL 2024, arXiv 2308.14508): its tasks, the published prompts, truncation in the middle, and which
//! metric belongs to which task.
//!
//! Prompts and lengths are data of the benchmark, in `longbench.json` with source and licence: scores can be compared only
//! with exactly those. The five Chinese tasks are refused: their metrics cut text into words by the dictionary of the
//! Python package jieba.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use serde::Deserialize;

use super::metrics;
use crate::error::{Error, Result, presentable};

/// Tasks in Chinese.
const CHINESE: [&str; 5] = ["multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"];

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Metric {
    QaF1,
    RougeL,
    Classification,
    Retrieval,
    Count,
    CodeSimilarity,
}

/// A task of the benchmark.
#[derive(Debug, Deserialize)]
pub struct Task {
    /// As its file is called.
    pub name: String,
    /// With `{context}` and `{input}`.
    prompt: String,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    metric: Metric,
    /// Examples or code: chat models get these prompts without their template.
    pub plain: bool,
    /// Only the first line of an answer counts.
    first_line: bool,
    /// An answer ends with its line, and has at least one token.
    pub one_line: bool,
}

#[derive(Deserialize)]
struct Tasks {
    tasks: Vec<Task>,
}

static TASKS: LazyLock<Vec<Task>> = LazyLock::new(|| {
    let tasks: Tasks =
        serde_json::from_str(include_str!("longbench.json")).expect("a file of ours, which a test reads");
    tasks.tasks
});

/// The names of all tasks that can be run.
pub fn names() -> Vec<&'static str> {
    TASKS.iter().map(|task| task.name.as_str()).collect()
}

/// The task of a name; `qasper_e` is `qasper` on the data of LongBench-E.
///
/// # Errors
/// [`Error::Usage`] for a Chinese task, with the reason, and for a name that is none.
pub fn task(name: &str) -> Result<&'static Task> {
    let base = name.strip_suffix("_e").unwrap_or(name);
    if let Some(task) = TASKS.iter().find(|task| task.name == base) {
        return Ok(task);
    }
    if CHINESE.contains(&base) {
        return Err(Error::Usage(format!(
            "--tasks {name}: the Chinese tasks are not supported, as their metrics need the word list of the Python package \
             jieba; leave it out"
        )));
    }
    Err(Error::Usage(format!("--tasks {name}: no task of LongBench; there are {}", names().join(", "))))
}

/// The tasks whose files are in a folder, in the benchmark's order, each before its `_e`.
///
/// # Errors
/// [`Error::Io`] for a folder that cannot be read; [`Error::Usage`] for one without such files.
pub fn tasks_in(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    drop(entries);
    let all = names().into_iter().flat_map(|name| [name.to_owned(), format!("{name}_e")]);
    let found: Vec<String> = all.filter(|name| file_of(folder, name).is_file()).collect();
    if found.is_empty() {
        return Err(Error::Usage(format!(
            "--data {}: no file of an English task, such as qasper.jsonl; unpack data.zip of the dataset THUDM/LongBench",
            folder.display()
        )));
    }
    Ok(found)
}

fn file_of(folder: &Path, name: &str) -> std::path::PathBuf {
    folder.join(format!("{name}.jsonl"))
}

/// One question, as published.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Item {
    /// The question or instruction.
    pub input: String,
    /// What it is about.
    pub context: String,
    /// All true answers.
    pub answers: Vec<String>,
    /// Words of the three fields before.
    #[serde(default)]
    pub length: usize,
    /// All classes, in classification.
    #[serde(default)]
    pub all_classes: Option<Vec<String>>,
    /// The task whose item it is.
    #[serde(default)]
    pub dataset: Option<String>,
    /// Names the item.
    #[serde(rename = "_id")]
    pub id: String,
}

/// Most bytes of a task's file; the published ones have tens of megabytes.
const MOST_FILE_BYTES: u64 = 256 << 20;

/// The items of a task's file.
///
/// # Errors
/// [`Error::Io`] for a file that cannot be read; [`Error::Usage`] naming file, line and field of one that is not in the
/// published form, is no regular file or too large.
pub fn items(folder: &Path, name: &str) -> Result<Vec<Item>> {
    let task = task(name)?;
    let path = file_of(folder, name);
    let wrong = |what: &str| Error::Usage(format!("{}: {}", path.display(), presentable(what)));
    let meta = fs::metadata(&path).map_err(|e| Error::io(&path, e))?;
    if !meta.is_file() {
        return Err(wrong("not a regular file"));
    }
    if meta.len() > MOST_FILE_BYTES {
        return Err(wrong(&format!("{} bytes are too many; at most {MOST_FILE_BYTES} are read", meta.len())));
    }
    let bytes = fs::read(&path).map_err(|e| Error::io(&path, e))?;
    parse(task, &bytes).map_err(|(line, what)| match line {
        0 => wrong(&what),
        _ => wrong(&format!("line {line}: {what}")),
    })
}

/// The items of a file's bytes.
///
/// # Errors
/// The number of a line (from 1; 0: the whole file), and what is wrong with it.
pub fn parse(task: &Task, bytes: &[u8]) -> Result<Vec<Item>, (usize, String)> {
    let text = std::str::from_utf8(bytes).map_err(|e| (0, format!("byte {} is not valid UTF-8", e.valid_up_to())))?;
    let mut items: Vec<Item> = Vec::new();
    let mut ids = std::collections::HashSet::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |what: String| (i + 1, what);
        let item: Item = serde_json::from_str(line).map_err(|e| wrong(format!("not an item of LongBench ({e})")))?;
        item.check().map_err(wrong)?;
        // A name that is none of LongBench's may be anybody's own.
        let of = item.dataset.as_deref().and_then(|name| self::task(name).ok());
        if let Some(of) = of.filter(|of| of.name != task.name) {
            return Err(wrong(format!("`dataset` is {}, not {}: the item is in the wrong file", of.name, task.name)));
        }
        if task.metric == Metric::Classification && item.all_classes.is_none() {
            return Err(wrong("`all_classes` is missing, which classification needs".into()));
        }
        if task.metric == Metric::Retrieval && item.answers.iter().any(|a| metrics::retrieval("", a).is_none()) {
            return Err(wrong("`answers` must be like \"Paragraph 1\"".into()));
        }
        if !ids.insert(item.id.clone()) {
            return Err(wrong(format!("`_id` {} is that of an earlier line", item.id)));
        }
        items.push(item);
    }
    if items.is_empty() { Err((0, "has no items".into())) } else { Ok(items) }
}

impl Item {
    /// Metrics take time and memory by the products of lengths: ROUGE-L four bytes for each word of the answer and of the
    /// true one. The published answers have some kilobytes, and TREC 50 classes.
    fn check(&self) -> Result<(), String> {
        const MOST_ANSWER: usize = 64 << 10;
        const MOST_CLASSES: usize = 1000;
        const MOST_ID: usize = 200;
        if self.answers.is_empty() {
            return Err("`answers` is empty".into());
        }
        if self.answers.iter().any(|answer| answer.len() > MOST_ANSWER) {
            return Err(format!("`answers` has one of more than {MOST_ANSWER} bytes"));
        }
        if self.all_classes.as_ref().is_some_and(|classes| classes.len() > MOST_CLASSES) {
            return Err(format!("`all_classes` has more than {MOST_CLASSES} classes"));
        }
        // It is shown while the item is measured.
        if self.id.len() > MOST_ID || self.id.contains(char::is_control) {
            return Err(format!("`_id` must be a name of at most {MOST_ID} bytes without control characters"));
        }
        Ok(())
    }
}

impl Task {
    /// The prompt of an item.
    pub fn prompt(&self, item: &Item) -> String {
        let (mut out, mut rest) = (String::new(), self.prompt.as_str());
        let fields = [("{context}", &item.context), ("{input}", &item.input)];
        let next = |rest: &str| fields.iter().filter_map(|(name, value)| Some((rest.find(name)?, *name, *value))).min();
        while let Some((at, name, value)) = next(rest) {
            out.push_str(&rest[..at]);
            out.push_str(value);
            rest = &rest[at + name.len()..];
        }
        out + rest
    }

    /// The score of an answer, 0 to 1: the best over the true answers.
    pub fn score(&self, said: &str, item: &Item) -> f64 {
        let said = if self.first_line { said.trim_start_matches('\n').split('\n').next().unwrap_or("") } else { said };
        let classes = item.all_classes.as_deref().unwrap_or_default();
        let score = |truth: &String| match self.metric {
            Metric::QaF1 => metrics::qa_f1(said, truth),
            Metric::RougeL => metrics::rouge_l(said, truth),
            Metric::Classification => metrics::classification(said, truth, classes),
            Metric::Retrieval => metrics::retrieval(said, truth).unwrap_or(0.0),
            Metric::Count => metrics::count(said, truth),
            Metric::CodeSimilarity => metrics::code_similarity(said, truth),
        };
        item.answers.iter().map(score).fold(0.0, f64::max)
    }
}

/// The ids of a prompt that is longer than `most`, without its middle: the first and the last `most / 2`. `None` where it
/// is short enough.
pub fn halves(ids: &[u32], most: usize) -> Option<(&[u32], &[u32])> {
    let half = most / 2;
    (ids.len() > most).then(|| (&ids[..half], &ids[ids.len() - half..]))
}

/// Most tokens of a prompt for a model that was trained for `positions`: the published 3,500 for 4,096, 7,500 for 8,192,
/// 31,500 for 32,768, and so on; three quarters below 2,000.
pub fn default_max_length(positions: usize) -> usize {
    if positions < 2000 { positions * 3 / 4 } else { positions / 1000 * 1000 - 500 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(input: &str, context: &str, answers: &[&str]) -> Item {
        Item {
            input: input.into(),
            context: context.into(),
            answers: answers.iter().map(|&a| a.into()).collect(),
            length: 0,
            all_classes: Some(vec!["Date".into(), "City".into()]),
            dataset: None,
            id: "1".into(),
        }
    }

    #[test]
    fn all_english_tasks_are_there() {
        assert_eq!(names().len(), 16);
        for task in TASKS.iter() {
            assert!(task.prompt.contains("{context}"), "{}", task.name);
            assert!([32, 64, 128, 512].contains(&task.max_tokens), "{}", task.name);
        }
        assert_eq!(task("qasper_e").unwrap().name, "qasper");
        assert!(task("lsht").unwrap_err().to_string().contains("Chinese"));
        assert!(task("nothing").unwrap_err().to_string().contains("narrativeqa"));
    }

    #[test]
    fn prompts_are_filled_once() {
        // What looks like a field in the data stays as it is.
        let item = item("def {context}:", "x = {input}\n", &["y"]);
        let prompt = task("repobench-p").unwrap().prompt(&item);
        assert_eq!(prompt, "Please complete the code given below. \nx = {input}\ndef {context}:Next line of code:\n");
        assert!(task("lcc").unwrap().prompt(&item).ends_with("x = {input}\nNext line of code:\n"));
    }

    #[test]
    fn each_task_has_its_metric() {
        let score = |name: &str, said: &str, answers: &[&str]| task(name).unwrap().score(said, &item("", "", answers));
        assert_eq!(score("hotpotqa", "the red fox", &["dog", "red fox"]), 1.0);
        assert_eq!(score("trec", "\n\nCity\nDate", &["City"]), 1.0);
        assert_eq!(score("triviaqa", "Paris\nLondon", &["London"]), 0.0);
        assert_eq!(score("passage_count", "3 of 4", &["4"]), 0.5);
        assert_eq!(score("passage_retrieval_en", "Paragraph 4", &["Paragraph 4"]), 1.0);
        assert_eq!(score("lcc", "\nabcd", &["abxd"]), 0.75);
        assert!((score("gov_report", "the cat sat", &["the cat ran"]) - 2.0 / 3.0).abs() < 1e-7);
    }

    #[test]
    fn the_middle_is_cut_out() {
        let ids: Vec<u32> = (0..10).collect();
        assert_eq!(halves(&ids, 10), None);
        assert_eq!(halves(&ids, 7), Some((&ids[..3], &ids[7..])));
        for (positions, most) in [(4096, 3500), (8192, 7500), (16384, 15500), (32768, 31500), (1024, 768)] {
            assert_eq!(default_max_length(positions), most);
        }
    }

    #[test]
    fn files_that_are_not_as_published_are_refused_by_line() {
        let good = r#"{"input":"q","context":"c","answers":["Paragraph 1"],"length":3,"dataset":"x","language":"en","all_classes":null,"_id":"a"}"#;
        let parse = |name: &str, text: &str| parse(task(name).unwrap(), text.as_bytes());
        assert_eq!(parse("qasper", &format!("{good}\n\n")).unwrap().len(), 1);
        for (name, text, line, word) in [
            ("qasper", "", 0, "no items"),
            ("qasper", &format!("{good}\nnot json"), 2, "not an item"),
            ("qasper", &format!("{good}\n{good}"), 2, "earlier line"),
            ("qasper", &good.replace("\"context\"", "\"text\""), 1, "context"),
            ("qasper", &good.replace("[\"Paragraph 1\"]", "[]"), 1, "`answers` is empty"),
            ("qasper", &good.replace("\"a\"", "\"\\u001b[2J\""), 1, "`_id` must be"),
            ("qasper", &good.replace("\"a\"", &format!("{:?}", "a".repeat(201))), 1, "`_id` must be"),
            ("qasper", &good.replace("Paragraph 1", &"word ".repeat(14_000)), 1, "more than 65536 bytes"),
            ("trec", &good.replace("null", &format!("{:?}", vec!["x"; 1001])), 1, "more than 1000 classes"),
            ("trec", good, 1, "all_classes"),
            ("qasper", &good.replace("\"x\"", "\"lcc_e\""), 1, "`dataset` is lcc, not qasper"),
            ("passage_retrieval_en", &good.replace("Paragraph 1", "one"), 1, "Paragraph"),
        ] {
            let (at, what) = parse(name, text).unwrap_err();
            assert!(at == line && what.contains(word), "{at} {what}");
        }
    }
}
