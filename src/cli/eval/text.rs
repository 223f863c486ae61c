//! `eval ppl`, `kld` and `coverage`: windows of a text, every variant side by side.

use std::fmt::Display;

use serde_json::{Value, json};
use specache::error::{Error, Result};
use specache::eval::coverage::{self, Hits, Layer};
use specache::eval::divergence::{self, Window};
use specache::eval::lockstep::Guesses;
use specache::eval::perplexity::Window as Likelihood;
use specache::eval::picture::Bars;
use specache::eval::windows::{Cut, cut};
use specache::eval::{self, perplexity};
use specache::kv::{KvMode, KvOptions};

use super::args::{CoverageArgs, KldArgs, PplArgs, TextArgs};
use super::{
    Items, Subject, ids_hash, measure, names, plot_file, report, report_drawn, some, unreadable, variant, variants_key,
};
use crate::cli::input;
use crate::cli::output::table;
use crate::cli::progress::say;

/// Tokens of a window unless the user says otherwise.
const WINDOW: usize = 2048;

/// A text as it was given.
enum Text {
    Words(String),
    Ids(Vec<u32>),
}

impl Text {
    /// Needs no model, so that mistakes show before one is loaded.
    fn read(args: &TextArgs) -> Result<Text> {
        match (&args.file, &args.tokens) {
            (Some(file), None) => input::not_empty("-f", file).map(Text::Words),
            (None, Some(file)) => input::ids("--tokens", file).map(Text::Ids),
            (None, None) => Err(Error::Usage("no text: give one of -f/--file and --tokens".into())),
            _ => Err(Error::Usage("several texts: give only one of -f/--file and --tokens".into())),
        }
    }
}

/// A text in windows.
struct Windows {
    ids: Vec<Vec<u32>>,
    cut: Cut,
    /// Of the whole text.
    hash: String,
}

impl Windows {
    fn new(args: &TextArgs, text: Text, subject: &Subject) -> Result<Windows> {
        let config = &subject.engine.model().config;
        let length = args.ctx_size.unwrap_or(WINDOW.min(config.max_positions));
        let cut_at = Cut { length, prefill: args.prefill.unwrap_or(length / 2), most: args.windows };
        let (prefix, tokens) = match text {
            Text::Words(text) => {
                let tokenizer = subject.tokenizer()?;
                // A window begins as a text does.
                (tokenizer.encode("", true)?, tokenizer.encode(&text, false)?)
            }
            Text::Ids(ids) => (Vec::new(), ids),
        };
        input::check_ids("--tokens", &tokens, config.vocab_size)?;
        let ids = cut(&tokens, &prefix, cut_at)?;
        subject.check_length(length)?;
        let all = tokens.len() / (length - prefix.len());
        if ids.len() < all {
            say(format_args!("the text has {all} windows, of which the first {} are used (--windows)", ids.len()));
        }
        Ok(Windows { ids, cut: cut_at, hash: ids_hash(&[prefix, tokens].concat()) })
    }

    /// Tokens that are scored in a window.
    fn scored(&self) -> usize {
        self.cut.length - self.cut.prefill - 1
    }

    /// What the results depend on.
    fn key(&self, subject: &Subject, variants: &[KvOptions]) -> Result<Value> {
        Ok(json!({
            "model": subject.identity(false)?,
            "the text (-f, --tokens)": self.hash,
            "-c": self.cut.length,
            "--prefill": self.cut.prefill,
            "--windows": self.ids.len(),
            "--kv": variants_key(variants),
        }))
    }

    fn json(&self) -> Value {
        let scored = self.ids.len() * self.scored();
        json!({ "windows": self.ids.len(), "window": self.cut.length, "prefill": self.cut.prefill, "scored_tokens": scored })
    }

    fn begin<'a>(
        &self,
        command: &str,
        subject: &Subject,
        variants: &[KvOptions],
        results: &'a super::Results,
    ) -> Result<Items<'a>> {
        let what = format!(
            "{} of {} tokens, {} scored in each; {}",
            some(self.ids.len(), "window"),
            self.cut.length,
            self.scored(),
            names(variants)
        );
        Items::begin(command, self.key(subject, variants)?, results, self.ids.len(), &what)
    }

    /// The result of every window. `one` gets a window's tokens, its prompt length and a function for its progress.
    fn each(
        &self,
        items: &mut Items,
        mut one: impl FnMut(&[u32], usize, &mut dyn FnMut(usize)) -> Result<Value>,
    ) -> Result<Vec<Value>> {
        let (prefill, scored) = (self.cut.prefill, self.scored());
        let mut window = |(i, ids): (usize, &Vec<u32>)| {
            items.item(&format!("window {i}"), |show| {
                show(&format_args!("prefill of {prefill} tokens"));
                one(ids, prefill, &mut |step| show(&format_args!("step {step} of {scored}") as &dyn Display))
            })
        };
        self.ids.iter().enumerate().map(&mut window).collect()
    }
}

/// A variant's part of a window's result.
fn part<'a>(result: &'a Value, name: &str) -> Result<&'a Value> {
    result.get(name).ok_or_else(|| unreadable(name))
}

fn number(value: &Value, name: &str) -> Result<f64> {
    value[name].as_f64().ok_or_else(|| unreadable(name))
}

/// `eval ppl`.
pub fn perplexity(args: &PplArgs) -> Result<()> {
    let variants = args.variants.options(&[KvMode::Full, KvMode::Kivi, KvMode::SpeCache])?;
    let text = Text::read(&args.text)?;
    let subject = Subject::load(&args.model, &variants, &args.results)?;
    let windows = Windows::new(&args.text, text, &subject)?;
    let items = windows.begin("ppl", &subject, &variants, &args.results)?;
    let (subject, results) = measure(subject, items, |subject, items| {
        windows.each(items, |ids, prefill, progress| {
            let windows = perplexity::window(&subject.engine, &variants, ids, prefill, progress)?;
            let json = |w: Likelihood| json!({ "nll": w.nll, "guesses": guesses_json(w.guesses) });
            let named = variants.iter().map(eval::name).zip(windows.into_iter().map(json));
            Ok(json!(named.collect::<serde_json::Map<_, _>>()))
        })
    })?;
    let scored = (windows.scored() * windows.ids.len()) as f64;
    let (mut rows, mut json_rows, mut first) = (Vec::new(), Vec::new(), None);
    for kv in &variants {
        let name = eval::name(kv);
        let parts = results.iter().map(|result| part(result, &name)).collect::<Result<Vec<&Value>>>()?;
        let sums = parts.iter().map(|part| number(part, "nll")).collect::<Result<Vec<f64>>>()?;
        let guesses = parts.iter().try_fold(Guesses::default(), |sum, part| read_guesses(part).map(|g| sum.plus(g)))?;
        let nll = sums.iter().sum::<f64>() / scored;
        let more = (nll - *first.get_or_insert(nll)).exp() - 1.0;
        let shown = [format!("{:.4}", nll.exp()), format!("{nll:.5}"), format!("{:+.2} %", more * 100.0)];
        rows.push([name].into_iter().chain(shown).chain([acceptance(guesses)]).collect::<Vec<String>>());
        let mut row = variant(kv);
        row["perplexity"] = json!(nll.exp());
        row["nll"] = json!(nll);
        row["nll_per_window"] = json!(sums.iter().map(|sum| sum / windows.scored() as f64).collect::<Vec<_>>());
        row["acceptance"] = json!(guesses.acceptance());
        json_rows.push(row);
    }
    let text = table(&["KV", "perplexity", "nats per token", "against the first", "acceptance"], &rows);
    let json =
        json!({ "eval": "ppl", "model": subject.engine.model().name, "text": windows.json(), "variants": json_rows });
    report(&args.results, &json, &text)
}

/// `eval kld`.
pub fn divergence(args: &KldArgs) -> Result<()> {
    let KldArgs { on: args, plot } = args;
    let mut variants = args.variants.options(&[KvMode::Kivi, KvMode::SpeCache])?;
    // The reference itself is no row.
    variants.retain(|kv| kv.mode != KvMode::Full);
    if variants.is_empty() {
        return Err(Error::Usage("--kv full: eval kld measures the other modes against it; name some".into()));
    }
    let plot = plot_file(plot.as_ref())?;
    let text = Text::read(&args.text)?;
    let subject = Subject::load(&args.model, &variants, &args.results)?;
    let windows = Windows::new(&args.text, text, &subject)?;
    let items = windows.begin("kld", &subject, &variants, &args.results)?;
    let (subject, results) = measure(subject, items, |subject, items| {
        windows.each(items, |ids, prefill, progress| {
            let of = divergence::window(&subject.engine, &variants, ids, prefill, progress)?;
            let named = variants.iter().map(eval::name).zip(of);
            let json = |w: Window| json!({ "agreed": w.agreed, "guesses": guesses_json(w.guesses), "kl": w.kl });
            Ok(json!(named.map(|(name, w)| (name, json(w))).collect::<serde_json::Map<_, _>>()))
        })
    })?;
    let (mut rows, mut json_rows, mut groups) = (Vec::new(), Vec::new(), Vec::new());
    for kv in &variants {
        let name = eval::name(kv);
        let read = results.iter().map(|result| read_divergence(part(result, &name)?));
        let Some(s) = divergence::summary(&read.collect::<Result<Vec<Window>>>()?) else {
            return Err(unreadable(&name));
        };
        if kv.mode.low_bit() && s.max == 0.0 {
            say(format_args!(
                "note: {name}: no token was read at low bit, so these zeros say nothing: windows of {} tokens end too soon \
                 behind the 16-bit residual; take a longer -c or a smaller --kv-residual, --kv-top-k",
                windows.cut.length
            ));
        }
        let nats = |x: f64| format!("{x:.3e}");
        rows.push(vec![
            name.clone(),
            nats(s.mean),
            nats(s.median),
            nats(s.p99),
            nats(s.max),
            format!("{:.2} %", s.top1 * 100.0),
            acceptance(s.guesses),
        ]);
        let mut row = variant(kv);
        for (field, x) in
            [("mean", s.mean), ("median", s.median), ("p99", s.p99), ("max", s.max), ("top1_agreement", s.top1)]
        {
            row[field] = json!(x);
        }
        row["acceptance"] = json!(s.guesses.acceptance());
        json_rows.push(row);
        groups.push((name, vec![Some(s.mean), Some(s.p99)]));
    }
    let text = table(&["KV", "mean KLD", "median", "p99", "max", "top-1 agreement", "acceptance"], &rows);
    let json =
        json!({ "eval": "kld", "model": subject.engine.model().name, "text": windows.json(), "variants": json_rows });
    report_drawn(&args.results, &json, &text, plot, || {
        let model = &subject.engine.model().name;
        let title = format!("KL divergence from full: {model}, windows of {} tokens", windows.cut.length);
        let series = vec!["mean".into(), "99th percentile".into()];
        Bars { title, axis: "nats per token, logarithmic".into(), logarithmic: true, series, groups }.svg()
    })
}

fn guesses_json(guesses: Guesses) -> Value {
    json!([guesses.right, guesses.of])
}

fn read_guesses(value: &Value) -> Result<Guesses> {
    let read = value["guesses"][0].as_u64().zip(value["guesses"][1].as_u64());
    read.map(|(right, of)| Guesses { right, of }).ok_or_else(|| unreadable("guesses"))
}

/// The share of right guesses, for people.
fn acceptance(guesses: Guesses) -> String {
    guesses.acceptance().map_or("n/a".into(), |x| format!("{x:.3}"))
}

fn read_divergence(value: &Value) -> Result<Window> {
    let bad = || unreadable("kl");
    let kl = value["kl"].as_array().ok_or_else(bad)?;
    let kl = kl.iter().map(|x| x.as_f64().map(|x| x as f32)).collect::<Option<Vec<f32>>>().ok_or_else(bad)?;
    let agreed = value["agreed"].as_u64().ok_or_else(bad)? as usize;
    Ok(Window { kl, agreed, guesses: read_guesses(value)? })
}

/// `eval coverage`.
pub fn coverage(args: &CoverageArgs) -> Result<()> {
    let CoverageArgs { on: args, plot } = args;
    let variants = args.variants.options(&[KvMode::SpeCache])?;
    if let Some(kv) = variants.iter().find(|kv| !kv.mode.fetches()) {
        let mode = kv.mode.name();
        return Err(Error::Usage(format!(
            "--kv {mode}: fetches no pairs, so that nothing is hit; use specache or fetch"
        )));
    }
    let plot = plot_file(plot.as_ref())?;
    let text = Text::read(&args.text)?;
    let subject = Subject::load(&args.model, &variants, &args.results)?;
    if subject.engine.device().is_gpu() {
        return Err(Error::Usage(
            "eval coverage looks at attention, which only the CPU device keeps: use --device cpu".into(),
        ));
    }
    let windows = Windows::new(&args.text, text, &subject)?;
    let items = windows.begin("coverage", &subject, &variants, &args.results)?;
    let (subject, results) = measure(subject, items, |subject, items| {
        windows.each(items, |ids, prefill, progress| {
            let layers = coverage::window(&subject.engine, &variants, ids, prefill, progress)?;
            Ok(json!(layers.iter().map(layer_json).collect::<Vec<_>>()))
        })
    })?;
    let mut layers = vec![Layer::default(); subject.engine.model().config.n_layers];
    for result in &results {
        let read = result.as_array().filter(|read| read.len() == layers.len()).ok_or_else(|| unreadable("layers"))?;
        for (layer, value) in layers.iter_mut().zip(read) {
            layer.add(&read_layer(value, variants.len())?);
        }
    }
    let mut all = Layer::default();
    layers.iter().for_each(|layer| all.add(layer));
    let lines: Vec<(String, &Layer)> =
        layers.iter().enumerate().map(|(l, layer)| (format!("layer {l}"), layer)).collect();
    let names: Vec<String> = variants.iter().map(eval::name).collect();
    let mut header = vec!["layer".to_string(), "keys that hold 90 %".into(), "share".into()];
    header.extend(names.iter().flat_map(|name| [format!("{name}: hits"), "attention ratio".into()]));
    let rows: Vec<Vec<String>> =
        lines.iter().map(|(name, layer)| coverage_row(name, layer)).chain([coverage_row("all", &all)]).collect();
    let text = table(&header.iter().map(String::as_str).collect::<Vec<_>>(), &rows);
    let json = json!({
        "eval": "coverage", "model": subject.engine.model().name, "text": windows.json(), "mass": coverage::MASS,
        "variants": variants.iter().map(variant).collect::<Vec<_>>(),
        "layers": layers.iter().map(|layer| coverage_json(layer, &names)).collect::<Vec<_>>(),
        "all": coverage_json(&all, &names),
    });
    report_drawn(&args.results, &json, &text, plot, || coverage_picture(&subject, &variants, &lines).svg())
}

fn ratio(part: f64, of: u64) -> Option<f64> {
    (of > 0).then(|| part / of as f64)
}

fn coverage_row(name: &str, layer: &Layer) -> Vec<String> {
    let show = |x: Option<f64>, of: fn(f64) -> String| x.map_or("n/a".to_string(), of);
    let percent = |x: f64| format!("{:.2} %", x * 100.0);
    let mut row = vec![
        name.to_owned(),
        show(ratio(layer.keys, layer.of), |x| format!("{x:.1}")),
        show(ratio(layer.share, layer.of), percent),
    ];
    for hits in &layer.hits {
        row.push(show(ratio(hits.hits as f64, hits.of), |x| format!("{x:.3}")));
        row.push(show(ratio(hits.ratio, hits.ratio_of), |x| format!("{x:.3}")));
    }
    row
}

fn coverage_json(layer: &Layer, names: &[String]) -> Value {
    let hits = |(name, h): (&String, &Hits)| json!({ "name": name, "hit_rate": ratio(h.hits as f64, h.of), "attention_ratio": ratio(h.ratio, h.ratio_of) });
    json!({
        "keys": ratio(layer.keys, layer.of),
        "share_of_keys": ratio(layer.share, layer.of),
        "variants": names.iter().zip(&layer.hits).map(hits).collect::<Vec<_>>(),
    })
}

fn coverage_picture(subject: &Subject, variants: &[KvOptions], lines: &[(String, &Layer)]) -> Bars {
    let mut series = vec!["share of the keys that hold 90 % of the attention".to_string()];
    for kv in variants {
        series.push(format!("{}: true hit rate", eval::name(kv)));
        series.push(format!("{}: attention on the fetched pairs / on the true top-k", eval::name(kv)));
    }
    let values = |layer: &Layer| {
        let hits = layer.hits.iter().flat_map(|h| [ratio(h.hits as f64, h.of), ratio(h.ratio, h.ratio_of)]);
        [ratio(layer.share, layer.of)].into_iter().chain(hits).collect()
    };
    Bars {
        title: format!("Attention by layer: {}", subject.engine.model().name),
        axis: "share".into(),
        logarithmic: false,
        series,
        groups: lines.iter().map(|(name, layer)| (name.clone(), values(layer))).collect(),
    }
}

fn layer_json(layer: &Layer) -> Value {
    let hits = |h: &Hits| json!([h.hits, h.of, h.ratio, h.ratio_of]);
    json!({
        "share": layer.share,
        "keys": layer.keys,
        "of": layer.of,
        "hits": layer.hits.iter().map(hits).collect::<Vec<_>>(),
    })
}

fn read_layer(value: &Value, variants: usize) -> Result<Layer> {
    let bad = || unreadable("layers");
    let hits = |h: &Value| {
        Some(Hits { hits: h[0].as_u64()?, of: h[1].as_u64()?, ratio: h[2].as_f64()?, ratio_of: h[3].as_u64()? })
    };
    let read = value["hits"].as_array().filter(|read| read.len() == variants).ok_or_else(bad)?;
    Ok(Layer {
        share: number(value, "share")?,
        keys: number(value, "keys")?,
        of: value["of"].as_u64().ok_or_else(bad)?,
        hits: read.iter().map(hits).collect::<Option<Vec<Hits>>>().ok_or_else(bad)?,
    })
}
