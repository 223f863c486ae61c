//! `eval` and what is behind it: on the recall model, against lone runs, plain formulas and published figures.

mod common;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{fixture, kv, recall, run};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use specache::eval::{coverage, metrics};
use specache::kv::{KvMode, KvOptions};
use specache::reference;
use specache::sampler::argmax;
use specache::tokenizer::Tokenizer;
use specache::{Buffers, Engine, Next, Prompt};

// What all tests share

/// A folder of a test's own, empty.
fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("eval-{test}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// `eval` without the environment's own settings.
fn eval(args: &[&str]) -> Command {
    eval_of(&fixture("recall"), args)
}

/// `eval` of the model in this folder.
fn eval_of(model: &Path, args: &[&str]) -> Command {
    let mut command = common::command(&["eval"]);
    command.args(args).args(["--device", "cpu", "-m"]).arg(model);
    command
}

/// The recall model below `folder`, for a test to change.
fn recall_copy(folder: &Path) -> PathBuf {
    let model = folder.join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(fixture("recall")).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    model
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[track_caller]
fn succeed(args: &[&str]) -> Output {
    let output = eval(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    output
}

#[track_caller]
fn result(args: &[&str]) -> Value {
    serde_json::from_slice(&succeed(&[args, &["--json"]].concat()).stdout).unwrap()
}

#[track_caller]
fn fails(args: &[&str], words: &[&str]) {
    let output = eval(args).output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert!(words.iter().all(|word| stderr.contains(word)), "{args:?}: {stderr}");
}

#[track_caller]
fn near(x: f64, y: f64, tolerance: f64) {
    assert!((x - y).abs() <= tolerance, "{x} is not {y}");
}

#[derive(serde::Deserialize)]
struct Case {
    ids: Vec<u32>,
    answer: Vec<u32>,
}

fn cases() -> Vec<Case> {
    common::json(fixture("recall_prompts.json"))
}

/// A text of facts and questions: the prompts with their answers, one after the other.
fn long_ids() -> Vec<u32> {
    cases().iter().flat_map(|case| [case.ids.as_slice(), &case.answer].concat()).collect()
}

fn write_ids(folder: &Path, ids: &[u32]) -> String {
    let file = folder.join("ids.json");
    fs::write(&file, json!(ids).to_string()).unwrap();
    file.to_str().unwrap().into()
}

/// The named variant of a result.
fn variant<'a>(result: &'a Value, name: &str) -> &'a Value {
    let variants = result["variants"].as_array().unwrap();
    variants.iter().find(|v| v["name"] == name).unwrap_or_else(|| panic!("no {name} in {result}"))
}

fn number(of: &Value, name: &str) -> f64 {
    of[name].as_f64().unwrap_or_else(|| panic!("no {name} in {of}"))
}

// Perplexity and divergence

/// `-ln softmax`, in the plainest way.
fn nll(logits: &[f32], target: u32) -> f64 {
    let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    (sum / f64::from(logits[target as usize]).exp()).ln()
}

/// Both commands give what the logits of lone runs give, window by window. Scored are the targets of decode steps.
#[test]
fn perplexity_and_divergence_are_those_of_lone_runs() {
    const WINDOW: usize = 300;
    const PREFILL: usize = 220;
    let folder = folder("lone");
    let ids = long_ids();
    let file = write_ids(&folder, &ids);
    let args = ["--tokens", &file, "-c", "300", "--prefill", "220", "--windows", "2", "--kv-bits", "1,2"];
    let args = [&args[..], &["--kv-top-k", "16", "--kv", "full,kivi,fetch,specache"]].concat();
    let ppl = result(&[&["ppl"], &args[..]].concat());
    let kld = result(&[&["kld"], &args[..]].concat());
    assert_eq!((ppl["text"]["windows"].as_u64(), ppl["text"]["scored_tokens"].as_u64()), (Some(2), Some(158)));
    assert_eq!((ppl["variants"].as_array().unwrap().len(), kld["variants"].as_array().unwrap().len()), (7, 6));

    let engine = recall();
    let windows: Vec<&[u32]> = ids.chunks(WINDOW).take(2).collect();
    // Row 0 is of the prefill; the row behind it predicts the second token after the prompt.
    let rows = |kv: KvOptions| -> Vec<Vec<f32>> {
        windows.iter().flat_map(|ids| run(&engine, kv, ids, PREFILL, None).0.split_off(1)).collect()
    };
    let acceptance = |kv: KvOptions| {
        let stats = |ids: &&[u32]| run(&engine, kv, ids, PREFILL, None).1.stats().clone();
        let (right, of) = windows.iter().map(stats).fold((0, 0), |sum, s| (sum.0 + s.accepted, sum.1 + s.compared));
        (of > 0).then(|| right as f64 / of as f64)
    };
    let targets: Vec<u32> = windows.iter().flat_map(|ids| ids[PREFILL + 1..].to_vec()).collect();
    let full = rows(kv(KvMode::Full, 2, 64, 64, 16));
    assert_eq!(full.len(), targets.len());
    let mean_nll = |rows: &[Vec<f32>]| {
        rows.iter().zip(&targets).map(|(row, &target)| nll(row, target)).sum::<f64>() / targets.len() as f64
    };
    near(number(variant(&ppl, "full"), "nll"), mean_nll(&full), 1e-9);
    for (name, options) in [
        ("kivi 1-bit R=64", kv(KvMode::Kivi, 1, 64, 64, 16)),
        ("kivi 2-bit R=64", kv(KvMode::Kivi, 2, 64, 64, 16)),
        ("fetch 1-bit R=64 k=16", kv(KvMode::Fetch, 1, 64, 64, 16)),
        ("specache 1-bit R=64 k=16", kv(KvMode::SpeCache, 1, 64, 64, 16)),
        ("specache 2-bit R=64 k=16", kv(KvMode::SpeCache, 2, 64, 64, 16)),
    ] {
        let rows = rows(options);
        let expected = mean_nll(&rows);
        near(number(variant(&ppl, name), "nll"), expected, 1e-9);
        near(number(variant(&ppl, name), "perplexity"), expected.exp(), 1e-6);
        let mut kl: Vec<f64> = full.iter().zip(&rows).map(|(p, q)| reference::kl_divergence(p, q)).collect();
        let agreed = full.iter().zip(&rows).filter(|(p, q)| argmax(p) == argmax(q)).count();
        let got = variant(&kld, name);
        near(number(got, "mean"), kl.iter().sum::<f64>() / kl.len() as f64, 1e-7);
        near(number(got, "top1_agreement"), agreed as f64 / kl.len() as f64, 1e-12);
        kl.sort_by(f64::total_cmp);
        // Of 158 values, 157 are at most the 99th percentile by nearest rank.
        near(number(got, "p99"), kl[156], 1e-6);
        near(number(got, "max"), kl[157], 1e-6);
        let (got_share, share) = (got["acceptance"].as_f64(), acceptance(options));
        assert_eq!(got_share.is_some(), share.is_some(), "{name}");
        near(got_share.unwrap_or(0.0), share.unwrap_or(0.0), 1e-12);
        assert_eq!(got["acceptance"], variant(&ppl, name)["acceptance"]);
    }
}

/// A text is cut like its ids, and each window begins as a text does.
#[test]
fn a_text_is_its_tokens() {
    let folder = folder("text");
    let tokenizer = Tokenizer::load(&fixture("recall")).unwrap().unwrap();
    let prompt = fixture("recall_prompt.txt");
    let ids = tokenizer.encode(&fs::read_to_string(&prompt).unwrap(), false).unwrap();
    let first = tokenizer.encode("", true).unwrap();
    let own = 200 - first.len();
    let windows: Vec<u32> = ids.chunks_exact(own).take(2).flat_map(|w| [&first[..], w].concat()).collect();
    let file = write_ids(&folder, &windows);
    let args = ["-c", "200", "--windows", "2", "--kv", "full"];
    let of_text = result(&[&["ppl", "-f", prompt.to_str().unwrap()], &args[..]].concat());
    let of_ids = result(&[&["ppl", "--tokens", &file], &args[..]].concat());
    assert_eq!(of_text["variants"], of_ids["variants"]);
}

// Coverage

/// Layer 0's attention needs nothing but embeddings: it is what the reference's operations give, one by one.
#[test]
fn kept_attention_of_layer_0_is_that_of_the_reference() {
    let engine = recall();
    let (model, ids) = (engine.model(), &cases()[0].ids[..150]);
    let (config, layer) = (&model.config, &model.weights.layers[0]);
    let options = kv(KvMode::Full, 2, 64, 64, 16);
    let mut session = engine.session(options, ids.len()).unwrap();
    let mut buffers = Buffers::default();
    let prompt = Prompt { session: &mut session, tokens: &ids[..149] };
    engine.prefill(&mut [prompt], &mut buffers).unwrap().remove(0).unwrap();
    assert!(session.attention().is_none());
    session.keep_attention().unwrap();
    engine.decode(&mut [Next { session: &mut session, token: ids[149] }], &mut buffers).unwrap();
    let kept = &session.attention().unwrap()[0];
    assert_eq!((kept.seen.clone(), kept.low_bit.clone(), kept.fetched.len()), (0..150, 0..0, 0));

    let normed = |id| {
        let x = reference::embed(&model.weights.embed, id);
        reference::rms_norm(&x, &layer.input_norm, config.rms_norm_eps)
    };
    let turned = |mut x: Vec<f32>, position: usize| {
        let (cos, sin) = reference::rope_cos_sin(&config.rope, config.head_dim, position);
        x.chunks_exact_mut(config.head_dim).for_each(|head| reference::rope_rotate(head, &cos, &sin));
        x
    };
    let q = turned(reference::linear(&layer.q, &normed(ids[149])), 149);
    let k: Vec<Vec<f32>> = ids
        .iter()
        .enumerate()
        .map(|(i, &id)| turned(reference::linear(&layer.k, &normed(id)), i))
        .map(|k| k.into_iter().map(|x| reference::round_kv(x, options.kv_dtype(config))).collect())
        .collect();
    for (head, probabilities) in kept.probabilities.chunks_exact(150).enumerate() {
        let group = head / config.group_heads();
        let of = |x: &[f32], head: usize| x[head * config.head_dim..(head + 1) * config.head_dim].to_vec();
        let q = of(&q, head);
        let score = |k: &Vec<f32>| reference::dot(&q, &of(k, group)) / (config.head_dim as f32).sqrt();
        let expected = reference::softmax(&k.iter().map(score).collect::<Vec<f32>>());
        // A bf16 number of K may round the other way: 2^-9 of one of 64 products.
        let distance = common::max_difference(probabilities, &expected);
        assert!(distance < 2e-3, "head {head}: {distance}");
    }
}

/// Sums over a window are those that a plain loop over kept attention and traced selections gives; what is fetched at a
/// step is what the step before has selected.
#[test]
fn coverage_is_counted_as_by_hand() {
    const PREFILL: usize = 300;
    let engine = recall();
    let ids = &long_ids()[..420];
    let options = kv(KvMode::SpeCache, 1, 64, 64, 16);
    let counted = coverage::window(&engine, &[options], ids, PREFILL, |_| {}).unwrap();
    let trace = run(&engine, options, ids, PREFILL, None).1.trace().unwrap().clone();

    let config = &engine.model().config;
    let mut full = engine.session(kv(KvMode::Full, 1, 64, 64, 16), ids.len()).unwrap();
    let mut buffers = Buffers::default();
    let prompt = Prompt { session: &mut full, tokens: &ids[..PREFILL] };
    engine.prefill(&mut [prompt], &mut buffers).unwrap().remove(0).unwrap();
    full.keep_attention().unwrap();
    let mut expected = vec![coverage::Layer { hits: vec![coverage::Hits::default()], ..Default::default() }; 4];
    // By the method: 192 tokens are offloaded, 64 more as soon as 128 are not, and those are read low-bit a step later.
    let (mut no, mut nq, mut n) = (192, 192, PREFILL);
    for (step, &token) in ids[PREFILL..ids.len() - 1].iter().enumerate() {
        engine.decode(&mut [Next { session: &mut full, token }], &mut buffers).unwrap();
        let fetched = if step == 0 { &trace.pre_decode } else { &trace.steps[step - 1] };
        for (l, (kept, sum)) in full.attention().unwrap().iter().zip(&mut expected).enumerate() {
            assert_eq!(kept.seen, 0..n + 1);
            for head in kept.probabilities.chunks_exact(n + 1) {
                near(head.iter().map(|&p| f64::from(p)).sum(), 1.0, 1e-4);
                let mut sorted = head.to_vec();
                sorted.sort_by(|a, b| b.total_cmp(a));
                let (mut held, mut keys) = (0.0, 0);
                while held < 0.9 {
                    held += f64::from(sorted[keys]);
                    keys += 1;
                }
                (sum.keys, sum.share, sum.of) =
                    (sum.keys + keys as f64, sum.share + keys as f64 / (n + 1) as f64, sum.of + 1);
            }
            for (kv_head, fetched) in fetched[l].iter().enumerate() {
                let heads = kept.probabilities.chunks_exact(n + 1);
                let heads = heads.skip(kv_head * config.group_heads()).take(config.group_heads());
                let heads: Vec<Vec<f32>> = heads.map(|head| head[..nq].to_vec()).collect();
                let mean = reference::mean_probabilities(&heads);
                let best = reference::top_k(&mean, 16);
                let mass = |positions: &[u32]| positions.iter().map(|&p| f64::from(mean[p as usize])).sum::<f64>();
                let hits = &mut sum.hits[0];
                hits.hits += best.iter().filter(|p| fetched.contains(p)).count() as u64;
                hits.of += 16;
                hits.ratio += mass(fetched) / mass(&best);
                hits.ratio_of += 1;
            }
        }
        (nq, n) = (no, n + 1);
        no += if n - no >= 128 { 64 } else { 0 };
    }
    assert!(nq > 192, "a page border was crossed");
    for (counted, expected) in counted.iter().zip(&expected) {
        let (c, e) = (&counted.hits[0], &expected.hits[0]);
        assert_eq!((counted.keys, counted.of, c.of, c.ratio_of), (expected.keys, expected.of, e.of, e.ratio_of));
        near(counted.share, expected.share, 1e-9);
        // Sums in another order: of means that are equal but for their last bit, another one may be in the top-k.
        near(c.hits as f64, e.hits as f64, 0.001 * e.of as f64);
        near(c.ratio, e.ratio, 1e-3);
    }
}

/// With k at least the context everything is fetched, so that nothing can be missed.
#[test]
fn what_is_fetched_whole_is_hit_always() {
    let folder = folder("whole");
    let file = write_ids(&folder, &long_ids());
    let args = ["coverage", "--tokens", &file, "-c", "300", "--windows", "1", "--kv", "specache,fetch", "--kv-top-k"];
    let coverage = result(&[&args[..], &["1000,16"]].concat());
    for layer in coverage["layers"].as_array().unwrap() {
        let rates =
            |i: usize| (number(&layer["variants"][i], "hit_rate"), number(&layer["variants"][i], "attention_ratio"));
        for whole in [0, 2] {
            assert_eq!(rates(whole).0, 1.0);
            near(rates(whole).1, 1.0, 1e-6);
        }
        // The real token chooses better than the speculative one, on a text whose next words cannot be guessed.
        assert!(rates(1).0 < rates(3).0 && rates(3).0 < 1.0, "{layer}");
        assert!((0.0..1.0).contains(&number(layer, "share_of_keys")));
    }
}

// Needles

/// Greedy answers of a lone session.
fn answer(engine: &Engine, kv: KvOptions, case: &Case) -> Vec<u32> {
    let mut buffers = Buffers::default();
    let mut session = engine.session(kv, case.ids.len() + case.answer.len()).unwrap();
    let prompt = Prompt { session: &mut session, tokens: &case.ids };
    let mut said = vec![argmax(&engine.prefill(&mut [prompt], &mut buffers).unwrap().remove(0).unwrap())];
    while said.len() < case.answer.len() {
        let token = *said.last().unwrap();
        engine.decode(&mut [Next { session: &mut session, token }], &mut buffers).unwrap();
        said.push(argmax(buffers.logits(0).unwrap()));
    }
    said
}

/// Ready prompts are asked as benches/recall.rs asks them.
#[test]
fn needles_of_a_file_are_answered_as_by_lone_runs() {
    let file = fixture("recall_prompts.json");
    let got = result(&["needle", "--prompts", file.to_str().unwrap(), "--kv-bits", "1", "--kv", "full,kivi,specache"]);
    let engine = recall();
    for (name, options) in [
        ("full", kv(KvMode::Full, 1, 64, 64, 64)),
        ("kivi 1-bit R=64", kv(KvMode::Kivi, 1, 64, 64, 64)),
        ("specache 1-bit R=64 k=64", kv(KvMode::SpeCache, 1, 64, 64, 64)),
    ] {
        let got = variant(&got, name);
        let right = cases().iter().filter(|case| answer(&engine, options, case) == case.answer).count();
        assert_eq!(got["whole"].as_u64(), Some(right as u64), "{name}");
        assert_eq!(got["prompts"].as_u64(), Some(6));
        let depths: Vec<f64> = got["cells"].as_array().unwrap().iter().map(|cell| number(cell, "depth")).collect();
        near(depths[0], 100.0 / 12.0, 1e-9);
        near(depths[5], 100.0 * 11.0 / 12.0, 1e-9);
    }
}

/// A needle in a file's text: found at all depths in `full`; the picture shows each mode.
#[test]
fn a_needle_in_a_haystack_is_found() {
    let folder = folder("haystack");
    let prompt = fs::read_to_string(fixture("recall_prompt.txt")).unwrap();
    let haystack = folder.join("haystack.txt");
    // Without its own fact and question.
    fs::write(&haystack, prompt.replace("The password of zili fimi maga losu.", "").replace(" Recall zili", ""))
        .unwrap();
    let plot = folder.join("needle.svg");
    let needle = [
        "--needle",
        "The password of zili fimi maga losu.",
        "--question",
        "Recall zili",
        "--answer",
        "Fimi maga, losu",
    ];
    let args = ["needle", "--haystack", haystack.to_str().unwrap(), "--lengths", "300,1500", "--depths", "0,50,90"];
    let args = [&args[..], &needle, &["-n", "3", "--kv", "full,kivi", "--kv-bits", "1"]].concat();
    let got = result(&[&args[..], &["--plot", plot.to_str().unwrap()]].concat());
    assert_eq!(number(variant(&got, "full"), "score"), 1.0);
    assert!(number(variant(&got, "kivi 1-bit R=64"), "score") < 1.0);
    for cell in variant(&got, "full")["cells"].as_array().unwrap() {
        let (tokens, length) = (number(cell, "tokens"), number(cell, "length"));
        assert!(tokens <= length && tokens > length - 30.0, "{cell}");
    }
    let svg = fs::read_to_string(&plot).unwrap();
    assert!(svg.contains("full, mean 1.000") && svg.contains("kivi 1-bit R=64") && svg.ends_with("</svg>\n"));
    let output = succeed(&args);
    let table = text(&output.stdout);
    assert!(table.contains("| full ") && table.contains("1.000 (3/3)") && !table.contains('\x1b'), "{table}");
    assert!(table.contains("in brackets the prompts with all of it"), "{table}");
    assert!(text(&output.stderr).contains("it begins again"), "{}", text(&output.stderr));
}

// LongBench

/// Scores of random answers by the published scripts, and scores that were worked out by hand, with which those scripts agree
/// (tools/longbench_metrics.py).
#[test]
fn metrics_are_the_published_ones() {
    let file: Value = common::json(fixture("longbench_metrics.json"));
    let classes: Vec<String> = serde_json::from_value(file["classes"].clone()).unwrap();
    let [cases, by_hand] = ["cases", "by_hand"].map(|name| file[name].as_array().unwrap());
    assert_eq!((cases.len(), by_hand.len()), (360, 69));
    for metric in ["qa_f1", "rouge_l", "code", "count", "retrieval", "classification"] {
        let some = |of: &dyn Fn(f64) -> bool| by_hand.iter().any(|c| c["metric"] == metric && of(number(c, "score")));
        let parts =
            [some(&|score| score == 0.0), some(&|score| 0.1 < score && score < 0.9), some(&|score| score > 0.99)];
        assert_eq!(parts, [true; 3], "{metric}: a miss, a part and a hit");
    }
    for case in cases.iter().chain(by_hand) {
        let (said, truth) = (case["said"].as_str().unwrap(), case["truth"].as_str().unwrap());
        let score = match case["metric"].as_str().unwrap() {
            "qa_f1" => metrics::qa_f1(said, truth),
            "rouge_l" => metrics::rouge_l(said, truth),
            "code" => metrics::code_similarity(said, truth),
            "count" => metrics::count(said, truth),
            "retrieval" => metrics::retrieval(said, truth).unwrap(),
            "classification" => metrics::classification(said, truth, &classes),
            other => panic!("{other}"),
        };
        assert!((score - number(case, "score")).abs() < 1e-9, "{score}: {case}");
    }
}

fn longbench_item(id: usize, context: &str, input: &str, answer: &str) -> Value {
    let words = context.split_whitespace().count();
    json!({"input": input, "context": context, "answers": [answer], "length": words, "dataset": "x", "language": "en",
           "all_classes": null, "_id": format!("item {id}")})
}

/// The published prompt is continued as `generate` continues it, and scored; long ones lose their middle.
#[test]
fn longbench_is_generate_and_a_metric() {
    let folder = folder("longbench");
    let haystack = fs::read_to_string(fixture("recall_prompt.txt")).unwrap();
    let context = haystack.trim_end_matches(" Recall zili");
    let line = |id| longbench_item(id, context, "Recall zili", "fimi maga losu").to_string();
    fs::write(folder.join("triviaqa_e.jsonl"), format!("{}\n{}\n", line(0), line(1))).unwrap();
    fs::write(folder.join("notes.txt"), "no task").unwrap();
    let data = folder.to_str().unwrap();
    let output = folder.join("out.jsonl");
    let got =
        result(&["longbench", "--data", data, "--kv", "full", "--limit", "1", "--output", output.to_str().unwrap()]);

    let prompt = format!(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. The \
         following are some examples.\n\n{context}\n\nRecall zili"
    );
    let file = folder.join("prompt.txt");
    fs::write(&file, &prompt).unwrap();
    let mut generate = common::command(&[]);
    generate
        .args(["generate", "--json", "--temp", "0", "-n", "32", "--kv", "full", "--device", "cpu", "-f"])
        .arg(&file);
    let generated = generate.arg("-m").arg(fixture("recall")).output().unwrap();
    let generated: Value = serde_json::from_slice(&generated.stdout).unwrap();
    let lines = fs::read_to_string(&output).unwrap();
    let kept: Value = serde_json::from_str(lines.lines().nth(1).unwrap()).unwrap();
    assert_eq!(kept["item"], "triviaqa_e item 0, full");
    assert_eq!(kept["result"]["pred"], generated["text"]);
    assert_eq!(kept["result"]["tokens"], generated["prompt_tokens"]);
    let first_line = generated["text"].as_str().unwrap().trim_start_matches('\n').split('\n').next().unwrap();
    let score = metrics::qa_f1(first_line, "fimi maga losu");
    assert!(score > 0.0, "{first_line}");
    let task = &variant(&got, "full")["tasks"][0];
    near(number(task, "score"), 100.0 * score, 1e-9);
    assert_eq!(
        (task["by_length"]["0-4k"].as_f64(), &task["by_length"]["8k+"]),
        (Some(number(task, "score")), &Value::Null)
    );

    let short = folder.join("short.jsonl");
    let args = ["longbench", "--data", data, "--kv", "full", "--limit", "1", "--max-length", "101", "--output"];
    succeed(&[&args[..], &[short.to_str().unwrap()]].concat());
    let kept: Value = serde_json::from_str(fs::read_to_string(&short).unwrap().lines().nth(1).unwrap()).unwrap();
    // Half of 101 from each side; where they meet, two pieces of words may become one token or three.
    near(number(&kept["result"], "tokens"), 100.0, 2.0);
}

/// samsum alone, as published: its first token is never one of those that end an answer (that of the end of a text, which is
/// made to be what the model would say first, and a newline's). An id beyond the vocabulary ends nothing, with a warning.
#[test]
fn samsum_answers_are_never_empty() {
    let tasks = specache::eval::longbench::names();
    let one_line = |name: &&&str| specache::eval::longbench::task(name).unwrap().one_line;
    assert_eq!(tasks.iter().filter(one_line).collect::<Vec<_>>(), [&"samsum"]);
    let folder = folder("samsum");
    let model = recall_copy(&folder);
    let item = longbench_item(0, "The password of kose is zesi rere bago.", "Recall kose", "zesi rere bago");
    for task in ["samsum", "triviaqa"] {
        fs::write(folder.join(format!("{task}.jsonl")), item.to_string()).unwrap();
    }
    let tokenizer = Tokenizer::load(&model).unwrap().unwrap();
    let ask = |task: &str| {
        let output = folder.join("out.jsonl");
        let _ = fs::remove_file(&output);
        let args = ["longbench", "--data", folder.to_str().unwrap(), "--kv", "full", "--tasks", task];
        let ended = eval_of(&model, &args).arg("--output").arg(&output).output().unwrap();
        assert!(ended.status.success(), "{}", text(&ended.stderr));
        let line: Value = serde_json::from_str(fs::read_to_string(&output).unwrap().lines().nth(1).unwrap()).unwrap();
        (line["result"]["pred"].as_str().unwrap().to_string(), text(&ended.stderr).to_string())
    };
    let newline = *tokenizer.encode("\n", false).unwrap().last().unwrap();
    for task in ["samsum", "triviaqa"] {
        // What a lone run would say first, and what it would say if it might not.
        let prompt = specache::eval::longbench::task(task).unwrap();
        let prompt = prompt.prompt(&serde_json::from_value(item.clone()).unwrap());
        let ids = tokenizer.encode(&prompt, true).unwrap();
        let (engine, mut buffers) = (recall(), Buffers::default());
        let mut session = engine.session(kv(KvMode::Full, 2, 64, 64, 16), ids.len() + 1).unwrap();
        let prompt = Prompt { session: &mut session, tokens: &ids };
        let mut logits = engine.prefill(&mut [prompt], &mut buffers).unwrap().remove(0).unwrap();
        let first = argmax(&logits);
        [first, newline].iter().for_each(|&id| logits[id as usize] = f32::NEG_INFINITY);
        let second = tokenizer.decode(&[argmax(&logits)]).unwrap();
        fs::write(model.join("generation_config.json"), json!({"eos_token_id": [first, 99_999]}).to_string()).unwrap();
        let (said, stderr) = ask(task);
        match task {
            "samsum" => assert!(!second.is_empty() && said.starts_with(&second), "{said:?}, not {second:?}"),
            _ => assert_eq!(said, ""),
        }
        assert!(stderr.contains("eos_token_id 99999 is beyond the vocabulary"), "{stderr}");
    }
}

/// samsum alone ends at a newline, and keeps nothing of it; the tokens go on in every other task. The recall model ends its
/// answers with a full stop, which is a newline here: the tokenizer has the two in each other's place.
#[test]
fn samsum_answers_end_with_their_line() {
    let folder = folder("newline");
    let model = recall_copy(&folder);
    let file = model.join("tokenizer.json");
    let mut changed: Value = common::json(&file);
    let vocab = &mut changed["model"]["vocab"];
    let [stop, newline] = [".", "Ċ"].map(|piece| vocab[piece].clone());
    (vocab["."], vocab["Ċ"]) = (newline.clone(), stop);
    fs::write(&file, changed.to_string()).unwrap();
    let tokenizer = Tokenizer::load(&model).unwrap().unwrap();
    let newline = tokenizer.encode("\n", false).unwrap();
    assert_eq!(tokenizer.decode(&newline).unwrap(), "\n");

    let item = longbench_item(0, "The password of kose is zesi rere bago\n", " Recall kose", "zesi rere bago");
    for (name, most) in [("samsum", 128), ("triviaqa", 32)] {
        fs::write(folder.join(format!("{name}.jsonl")), item.to_string()).unwrap();
        let task = specache::eval::longbench::task(name).unwrap();
        let prompt = task.prompt(&serde_json::from_value(item.clone()).unwrap());
        let ids = tokenizer.encode(&prompt, true).unwrap();
        // All that the model would say, token by token; samsum's first one is no newline.
        let (engine, mut buffers) = (recall(), Buffers::default());
        let mut session = engine.session(kv(KvMode::Full, 2, 64, 64, 16), ids.len() + most).unwrap();
        let prompts = &mut [Prompt { session: &mut session, tokens: &ids }];
        let mut logits = engine.prefill(prompts, &mut buffers).unwrap().remove(0).unwrap();
        if name == "samsum" {
            logits[newline[0] as usize] = f32::NEG_INFINITY;
        }
        let mut said = vec![argmax(&logits)];
        while said.len() < most && said.last() != Some(&1) {
            let token = *said.last().unwrap();
            engine.decode(&mut [Next { session: &mut session, token }], &mut buffers).unwrap();
            said.push(argmax(buffers.logits(0).unwrap()));
        }
        let all = tokenizer.decode(&said).unwrap();
        let line = all.split('\n').next().unwrap();
        assert!(!line.is_empty() && line.len() + 10 < all.len(), "a test of nothing: {all:?}");

        let output = folder.join(format!("{name}-out.jsonl"));
        let args = ["longbench", "--data", folder.to_str().unwrap(), "--kv", "full", "--tasks", name];
        assert!(eval_of(&model, &args).arg("--output").arg(&output).output().unwrap().status.success());
        let kept: Value = serde_json::from_str(fs::read_to_string(&output).unwrap().lines().nth(1).unwrap()).unwrap();
        let expected = if name == "samsum" { line } else { &all };
        assert_eq!(kept["result"]["pred"], expected, "{name}");
    }
}

// What is said

/// Each says at once what it does, before anything that takes long, and then how far it is within a prompt.
#[test]
fn long_prompts_show_how_far_they_are() {
    let folder = folder("progress");
    let hay = fixture("recall_prompt.txt");
    let context = fs::read_to_string(&hay).unwrap().repeat(4);
    fs::write(folder.join("hotpotqa.jsonl"), longbench_item(0, &context, "Recall zili", "fimi").to_string()).unwrap();
    let [hay, data] = [&hay, &folder].map(|path| path.to_str().unwrap());
    let needle = ["needle", "--haystack", hay, "--lengths", "3000", "--depths", "50", "--kv", "full", "-n", "2"];
    let longbench = ["longbench", "--data", data, "--kv", "full", "--max-length", "3000"];
    for (args, first, begun) in
        [(&needle[..], "loading ", "cutting the haystack into tokens\n"), (&longbench, "reading ", "loading ")]
    {
        let (mut ours, its) = common::terminal();
        common::set_columns(&ours, 71);
        let start = Instant::now();
        let mut command = eval(args);
        let mut child = command.env("TERM", "xterm").stdout(Stdio::null()).stderr(its).spawn().unwrap();
        drop(command); // and with it our handle of the program's end
        let mut shown = Vec::new();
        // The end of a pseudo-terminal that nobody has open any more is an error.
        let _ = ours.read_to_end(&mut shown);
        assert!(child.wait().unwrap().success());
        let shown = text(&shown);
        let shares = shown.split("prefill of ").skip(1).filter_map(|rest| {
            let (tokens, rest) = rest.split_once(" tokens, ")?;
            assert!((2900..=3000).contains(&tokens.parse::<u32>().unwrap()), "{tokens}");
            rest.split_once(" %")?.0.parse::<u32>().ok()
        });
        let shares: Vec<u32> = shares.collect();
        assert!(shares.first() == Some(&0) && shares.is_sorted(), "{shares:?}: {shown:?}");
        // What is wider would go on in the next row, and stay there; what comes faster nobody reads.
        let lines: Vec<&str> = shown.split("\r\x1b[2K").skip(1).map(|line| line.lines().next().unwrap_or("")).collect();
        let progress = lines.iter().filter(|line| line.contains("1 of 1: "));
        assert!(progress.clone().all(|line| line.len() < 71), "{lines:?}");
        assert!(progress.count() as f64 <= 4.0 + 10.0 * start.elapsed().as_secs_f64(), "{lines:?}");

        let said = succeed(args).stderr;
        let said = text(&said);
        assert!(said.starts_with(first) && said.contains(begun), "{said}");
    }
}

// The file of finished items

/// Interrupted wherever it may be, a run leaves whole lines and says 130; the same command goes on, and ends with the
/// results of a run without interruption.
#[test]
fn an_interrupted_run_is_continued() {
    let folder = folder("interrupt");
    let file = write_ids(&folder, &long_ids());
    let args = ["kld", "--tokens", &file, "-c", "300", "--kv-bits", "1", "--json"];
    let whole = succeed(&args).stdout;
    let mut interrupted = 0;
    for after_ms in [150, 400, 700, 1000, 1500] {
        let output = folder.join(format!("{after_ms}.jsonl"));
        let args = [&args[..], &["--output", output.to_str().unwrap()]].concat();
        let child = eval(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(after_ms));
        kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
        let ended = child.wait_with_output().unwrap();
        // Before `main` runs, the signal ends the process as it does any other.
        if matches!(ended.status.code(), Some(130) | None) {
            interrupted += 1;
            assert!(ended.stdout.is_empty());
        } else {
            assert_eq!(ended.stdout, whole, "{}", text(&ended.stderr));
        }
        let lines = fs::read_to_string(&output).unwrap_or_default();
        assert!(lines.is_empty() || lines.ends_with('\n'), "{lines}");
        assert!(lines.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
        assert_eq!(succeed(&args).stdout, whole, "interrupted after {after_ms} ms");
    }
    assert!(interrupted > 0, "all runs were over before they were interrupted");
}

#[test]
fn finished_items_are_not_measured_again() {
    let folder = folder("continue");
    let file = write_ids(&folder, &long_ids());
    let output = folder.join("out.jsonl");
    let path = output.to_str().unwrap();
    let args = ["ppl", "--tokens", &file, "-c", "200", "--windows", "3", "--kv", "full", "--output", path, "--json"];
    let first = succeed(&args).stdout;
    let kept = fs::read_to_string(&output).unwrap();
    // A figure that no run would give shows that it was not measured again.
    let lines: Vec<&str> = kept.lines().collect();
    let item: Value = serde_json::from_str(lines[1]).unwrap();
    let nll = item["result"]["full"]["nll"].to_string();
    fs::write(&output, kept.replace(&nll, "99.0")).unwrap();
    let doctored: Value = serde_json::from_slice(&succeed(&args).stdout).unwrap();
    near(variant(&doctored, "full")["nll_per_window"][0].as_f64().unwrap(), 1.0, 1e-12);
    // Half a line is removed, with a word about it.
    fs::write(&output, &kept[..kept.len() - 10]).unwrap();
    let continued = succeed(&args);
    assert_eq!(continued.stdout, first);
    assert!(text(&continued.stderr).contains("the last line was torn"), "{}", text(&continued.stderr));
    assert!(text(&continued.stderr).contains("2 of 3 items are finished already"));
    assert_eq!(fs::read_to_string(&output).unwrap(), kept);
    // Other options are refused, and the file is as before.
    let base = ["ppl", "--tokens", &file, "-c", "200", "--output", path];
    for (other, word) in [
        (&["--windows", "2", "--kv", "full"][..], "--windows was 3, is 2"),
        (&["--windows", "3", "--kv", "full", "--prefill", "50"], "--prefill was 100, is 50"),
        (&["--windows", "3", "--kv", "kivi"], "--kv was [\"full g=64 auto\"]"),
    ] {
        fails(&[&base[..], other].concat(), &["was written with other options", word]);
    }
    fails(&["kld", "--tokens", &file, "-c", "200", "--output", path], &["it is of `eval ppl`"]);
    assert_eq!(fs::read_to_string(&output).unwrap(), kept);
}

/// Whatever the results depend on is another than it was: the file is refused, with the name of what differs.
#[test]
fn results_of_another_model_or_data_are_refused_by_name() {
    let folder = folder("stale");
    let model = recall_copy(&folder);
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    fs::write(model.join("chat_template.jinja"), template).unwrap();
    let item = longbench_item(0, "The password of kose is zesi rere bago.", "Recall kose", "zesi rere bago");
    let data = folder.join("qasper_e.jsonl");
    fs::write(&data, item.to_string()).unwrap();
    let output = folder.join("out.jsonl");
    let [place, output] = [&folder, &output].map(|path| path.to_str().unwrap());
    let args = ["longbench", "--data", place, "--kv", "full", "--chat", "--output", output];
    let run = || eval_of(&model, &args).output().unwrap();
    assert!(run().status.success());
    let kept = fs::read(output).unwrap();
    let change = |file: &Path, from: &str, to: &str, named: &str| {
        let before = fs::read(file).unwrap();
        let changed = text(&before).replacen(from, to, 1);
        assert_ne!(changed.as_bytes(), before, "{from}");
        fs::write(file, changed).unwrap();
        let refused = run();
        let said = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{said}");
        assert!(said.contains("was written with other options") && said.contains(named), "{named}: {said}");
        assert_eq!(fs::read(output).unwrap(), kept);
        fs::write(file, before).unwrap();
    };
    let config = model.join("config.json");
    change(&config, "500000.0", "10000.0", "model config.json is another one");
    change(
        &model.join("chat_template.jinja"),
        "{{ m.content }}",
        "{{ m.content }} ",
        "model chat_template.jinja is another one",
    );
    change(&model.join("tokenizer.json"), "{", "{ ", "model tokenizer.json is another one");
    change(
        &model.join("generation_config.json"),
        "\"eos_token_id\": 1",
        "\"eos_token_id\": 2",
        "model eos was [1], is [2]",
    );
    change(&data, "\"length\":", "\"length\":1", "the data (--data) is another one");
    change(&data, "\"all_classes\":null", "\"all_classes\":[\"x\"]", "the data (--data) is another one");
    // The last norm, in bf16: bytes behind the header, found by name.
    let weights = model.join("model.safetensors");
    let sound = fs::read(&weights).unwrap();
    let header = u64::from_le_bytes(sound[..8].try_into().unwrap()) as usize;
    let names: Value = serde_json::from_slice(&sound[8..8 + header]).unwrap();
    for tensor in ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"] {
        let mut bytes = sound.clone();
        bytes[8 + header + names[tensor]["data_offsets"][0].as_u64().unwrap() as usize] ^= 1;
        fs::write(&weights, bytes).unwrap();
        let refused = run();
        assert!(text(&refused.stderr).contains("model weights is another one"), "{tensor}: {}", text(&refused.stderr));
    }
    fs::write(&weights, sound).unwrap();
    assert!(run().status.success(), "all is as it was");
}

// What people give

#[test]
fn bad_input_is_refused_by_name() {
    let folder = folder("bad");
    let ids = write_ids(&folder, &long_ids()[..400]);
    let ids = ids.as_str();
    let place = |name: &str, bytes: &[u8]| {
        fs::write(folder.join(name), bytes).unwrap();
        folder.join(name).to_str().unwrap().to_string()
    };
    let (binary, empty) = (place("binary", &[0xff, 0xfe]), place("empty", b" \n"));
    let (list, odd) = (place("list.json", b"[]"), place("odd.json", br#"[{"length":5,"ids":[1],"answer":[2]}]"#));
    let (hay, beyond) = (place("hay", b"Some words."), place("beyond.json", b"[1, 2, 99999]"));
    let data = folder.to_str().unwrap();
    place("qasper.jsonl", b"{}\n");
    place("lcc.jsonl", format!(r#"{{"answers":"{}"}}"#, "x".repeat(100_000)).as_bytes());
    std::os::unix::fs::symlink("/dev/zero", folder.join("samsum.jsonl")).unwrap();
    let endless = folder.join("samsum.jsonl").to_str().unwrap().to_string();
    for (args, words) in [
        (&["ppl"][..], &["no text", "--tokens"][..]),
        (&["ppl", "--tokens", ids, "-f", &hay], &["several texts"]),
        (&["ppl", "-f", &binary], &["not valid UTF-8"]),
        (&["ppl", "-f", &hay], &["a longer text or a smaller --ctx-size"]),
        (&["ppl", "--tokens", &beyond], &["99999", "vocabulary"]),
        (&["ppl", "--tokens", ids, "-c", "100", "--prefill", "99"], &["--prefill 99: must be from 1 to 98"]),
        (&["ppl", "--tokens", ids, "--windows", "0"], &["--windows 0"]),
        (&["ppl", "--tokens", ids, "-c", "100", "--kv-bits", "3"], &["--kv-bits 3: must be 1, 2 or 4"]),
        (&["ppl", "--tokens", ids, "-c", "100", "--kv-residual", "8"], &["--kv-residual 8"]),
        (&["kld", "--tokens", ids, "--kv", "full"], &["measures the other modes against it"]),
        (&["kld", "--tokens", ids, "-c", "100", "--plot", data], &["--plot", "is a folder"]),
        (&["coverage", "--tokens", ids, "--kv", "kivi"], &["--kv kivi", "fetches no pairs"]),
        (&["needle"], &["--haystack"]),
        (&["needle", "--haystack", &empty], &["--haystack", "empty"]),
        (&["needle", "--haystack", &hay, "--depths", "101"], &["--depths 101"]),
        (&["needle", "--haystack", &hay, "--lengths", "10"], &["--lengths 10", "alone are"]),
        (&["needle", "--haystack", &hay, "--lengths", "100,5000000"], &["--lengths 5000000", "at most 4194304"]),
        (&["needle", "--haystack", &hay, "--needle", "A."], &["--question"]),
        (
            &["needle", "--haystack", &hay, "--needle", "A.", "--question", "?", "--answer", "!"],
            &["--answer", "no words"],
        ),
        (&["needle", "--haystack", &hay, "-n", "0"], &["-n 0"]),
        (
            &["needle", "--haystack", &hay, "--lengths", "100", "-n", "18446744073709551615"],
            &["a context of", "at most"],
        ),
        (&["ppl", "--tokens", ids, "-c", "18446744073709551615"], &["a longer text or a smaller --ctx-size"]),
        (&["needle", "--haystack", &hay, "--chat"], &["--chat", "no chat template"]),
        (&["needle", "--prompts", &list], &["--prompts", "empty"]),
        (&["needle", "--prompts", &odd], &["prompt 0 has neither depth nor index"]),
        (&["needle", "--prompts", ids], &["not a JSON array of objects"]),
        (&["longbench", "--data", data], &["qasper.jsonl: line 1", "missing field"]),
        (
            &["longbench", "--data", data, "--tasks", "lcc"],
            &["lcc.jsonl: line 1", "xxx ... xxx", "expected a sequence"],
        ),
        (&["longbench", "--data", data, "--tasks", "samsum"], &["samsum.jsonl: not a regular file"]),
        (&["ppl", "-f", &endless], &["samsum.jsonl: more than 268435456 bytes"]),
        (&["needle", "--haystack", &endless], &["samsum.jsonl: more than"]),
        (&["needle", "--prompts", &endless], &["samsum.jsonl: more than"]),
        (&["longbench", "--data", data, "--tasks", "dureader"], &["dureader", "Chinese", "jieba"]),
        (&["longbench", "--data", data, "--tasks", "nothing"], &["no task of LongBench", "narrativeqa"]),
    ] {
        fails(args, words);
    }
    // A file that is not there is no usage error.
    let output = eval(&["longbench", "--data", data, "--tasks", "trec"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("trec.jsonl"), "{}", text(&output.stderr));
    let mut random = common::command(&[]);
    let output = random.args(["eval", "ppl", "-m", "synthetic:tiny", "--tokens", ids]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("random weights have no quality"), "{}", text(&output.stderr));
}

/// What is wrong with the arguments alone is said before a model is loaded, and at once.
#[test]
fn mistakes_show_before_a_model_is_loaded() {
    let folder = folder("before");
    let ids = write_ids(&folder, &long_ids()[..300]);
    let odd = folder.join("odd.json");
    fs::write(&odd, r#"[{"length":5,"ids":[1],"answer":[2]}]"#).unwrap();
    let (odd, hay) = (odd.to_str().unwrap(), fixture("recall_prompt.txt"));
    let (hay, place) = (hay.to_str().unwrap(), folder.to_str().unwrap());
    for args in [
        &["ppl"][..],
        &["ppl", "-f", "/nowhere"],
        &["ppl", "--tokens", &ids, "-f", hay],
        &["kld", "--tokens", &ids, "--output", place],
        &["ppl", "--tokens", &ids, "--output", "/nowhere/out.jsonl"],
        &["coverage", "-f", "/nowhere"],
        &["needle", "--haystack", "/nowhere"],
        &["needle", "--haystack", hay, "--depths", "101"],
        &["needle", "--haystack", hay, "--chat"],
        &["needle", "--haystack", hay, "--lengths", "200,100000000"],
        &["needle", "--prompts", odd],
        &["longbench", "--data", "/nowhere"],
    ] {
        let output = eval(args).output().unwrap();
        let said = text(&output.stderr);
        assert!(matches!(output.status.code(), Some(1 | 2)) && said.contains("error: "), "{args:?}: {said}");
        assert!(!said.contains("loading "), "{args:?}: {said}");
    }
}

#[test]
fn options_come_from_the_environment_too() {
    let folder = folder("environment");
    let file = write_ids(&folder, &long_ids());
    let given = ["-c", "200", "--windows", "1", "--kv", "kivi", "--kv-bits", "1,2"];
    let typed = succeed(&[&["ppl", "--json", "--tokens", &file], &given[..]].concat()).stdout;
    let mut command = eval(&["ppl", "-c", "200"]);
    for (name, value) in [("TOKENS", file.as_str()), ("EVAL_WINDOWS", "1"), ("KV_MODES", "kivi"), ("KV_BITS", "1,2")] {
        command.env(format!("SPECACHE_{name}"), value);
    }
    assert_eq!(text(&command.env("SPECACHE_JSON", "1").output().unwrap().stdout), text(&typed));
}

/// What excludes what is on the command line has no say in the environment; on one side both are refused.
#[test]
fn the_command_line_wins_over_variables_that_exclude_it() {
    let folder = folder("precedence");
    let (ids, prompts) = (write_ids(&folder, &long_ids()[..300]), folder.join("prompts.json"));
    fs::write(&prompts, r#"[{"length": 3, "ids": [5, 6, 7], "answer": [8], "depth": 50}]"#).unwrap();
    let (prompts, hay) = (prompts.to_str().unwrap(), fixture("recall_prompt.txt"));
    let hay = hay.to_str().unwrap();
    let run = |args: &[&str], variables: &[(&str, &str)]| {
        let variables = variables.iter().map(|(name, value)| (format!("SPECACHE_{name}"), value));
        eval(args).args(["--kv", "full"]).envs(variables).output().unwrap()
    };
    let ppl = ["ppl", "-c", "100", "--windows", "1"];
    let needle = ["needle", "--lengths", "200", "--depths", "50", "-n", "1"];
    for (args, variables) in [
        (&[&ppl[..], &["--tokens", &ids]].concat(), &[("FILE", "/nowhere")][..]),
        (&[&ppl[..], &["-f", hay]].concat(), &[("TOKENS", "/nowhere")]),
        (
            &vec!["needle", "--prompts", prompts],
            &[("EVAL_HAYSTACK", "/nowhere"), ("EVAL_LENGTHS", "7"), ("EVAL_NEEDLE", "x")],
        ),
        (&vec!["needle", "--prompts", prompts], &[("EVAL_CHAT", "0")]),
        (&vec!["needle"], &[("EVAL_PROMPTS", prompts), ("EVAL_CHAT", "off")]),
        (&[&needle[..], &["-f", hay]].concat(), &[("EVAL_PROMPTS", "/nowhere")]),
        (&needle.to_vec(), &[("EVAL_HAYSTACK", hay), ("EVAL_PROMPTS", "/nowhere")]),
    ] {
        let output = run(args, variables);
        assert!(output.status.success(), "{args:?}, {variables:?}: {}", text(&output.stderr));
    }
    for (args, variables, words) in [
        (&ppl[..], &[("FILE", hay), ("TOKENS", ids.as_str())][..], "several texts"),
        (&["needle", "--prompts", prompts, "-f", hay], &[], "cannot be used with"),
        (&["needle"], &[("EVAL_PROMPTS", prompts), ("EVAL_HAYSTACK", hay)], "cannot be used with"),
        (&["needle", "--prompts", prompts, "--chat"], &[("EVAL_CHAT", "0")], "cannot be used with"),
    ] {
        let output = run(args, variables);
        assert_eq!(output.status.code(), Some(2), "{args:?}, {variables:?}");
        assert!(text(&output.stderr).contains(words), "{args:?}, {variables:?}: {}", text(&output.stderr));
    }
    let mut simulate = common::command(&[]);
    simulate.args(["bench", "--simulate", "-d", "1000"]).env("SPECACHE_BENCH_OVERLAP", "1");
    assert!(simulate.output().unwrap().status.success());
    let mut simulate = common::command(&[]);
    simulate.args(["bench", "-d", "1000"]).env("SPECACHE_BENCH_OVERLAP", "no").env("SPECACHE_BENCH_SIMULATE", "yes");
    assert!(text(&simulate.output().unwrap().stdout).starts_with("Simulated"));
}

/// Every variant beside the others in one batch, on a GPU too; what only the CPU keeps is refused there.
#[test]
fn on_a_gpu() {
    common::emulated::on_gpu("on_a_gpu", &[], || {
        let engine = Engine::load(fixture("recall").to_str().unwrap(), &common::emulated::gpu_options()).unwrap();
        let options = kv(KvMode::SpeCache, 1, 64, 64, 16);
        let refused = engine.session(options, 10).unwrap().keep_attention().unwrap_err();
        assert!(refused.to_string().contains("--device cpu"), "{refused}");
        let variants = [kv(KvMode::Kivi, 2, 64, 64, 16), options];
        let ids = &long_ids()[..206];
        let of = |engine: &Engine| specache::eval::perplexity::window(engine, &variants, ids, 200, |_| {}).unwrap();
        let (gpu, cpu) = (of(&engine), of(&recall()));
        // 5 tokens; tests/cuda.rs bounds single logits.
        gpu.iter().zip(&cpu).for_each(|(gpu, cpu)| near(gpu.nll, cpu.nll, 0.25));
    });
}

/// The figures are not lost with a picture that cannot be written, and zeros that say nothing are told as such.
#[test]
fn tables_come_before_pictures() {
    let folder = folder("full-disk");
    let ids = write_ids(&folder, &long_ids());
    let args = ["kld", "--tokens", &ids, "-c", "100", "--windows", "1", "--kv", "kivi", "--plot", "/dev/full"];
    let output = eval(&args).output().unwrap();
    let (said, table) = (text(&output.stderr), text(&output.stdout));
    assert!(output.status.code() == Some(1) && said.contains("/dev/full"), "{said}");
    assert!(table.contains("| kivi 2-bit R=64 |"), "{table}");
    assert!(said.contains("note: kivi 2-bit R=64: no token was read at low bit"), "{said}");
    let longer = succeed(&["kld", "--tokens", &ids, "-c", "300", "--windows", "1", "--kv", "kivi"]);
    assert!(!text(&longer.stderr).contains("note: "), "{}", text(&longer.stderr));
}

/// Of several options that differ, one that people know.
#[test]
fn other_lengths_are_told_as_such() {
    let folder = folder("lengths");
    let (hay, output) = (fixture("recall_prompt.txt"), folder.join("out.jsonl"));
    let [hay, output] = [&hay, &output].map(|path| path.to_str().unwrap());
    let at = ["needle", "--haystack", hay, "--depths", "50", "--kv", "full", "-n", "2", "--output", output];
    let first = succeed(&[&at[..], &["--lengths", "200"]].concat());
    let said = text(&first.stderr);
    let tokens = said.split("1 prompt of up to ").nth(1).unwrap_or_else(|| panic!("{said}"));
    let (tokens, rest) = tokens.split_once(' ').unwrap();
    assert!(tokens.parse::<usize>().unwrap() <= 200 && rest.starts_with("tokens, answers of up to 2; full"), "{said}");
    fails(&[&at[..], &["--lengths", "200,300"]].concat(), &["--lengths was [200], is [200,300]; use"]);
}

/// A terminal that knows no colours and no way back in a line gets lines.
#[test]
fn a_dumb_terminal_gets_plain_lines() {
    let hay = fixture("recall_prompt.txt");
    let args = ["needle", "--haystack", hay.to_str().unwrap(), "--lengths", "100", "--depths", "50", "--kv", "full"];
    let (mut ours, its) = common::terminal();
    let mut command = eval(&args);
    command.env_remove("NO_COLOR").env("TERM", "dumb").stdout(its.try_clone().unwrap()).stderr(its);
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut shown = Vec::new();
    let _ = ours.read_to_end(&mut shown);
    assert!(child.wait().unwrap().success());
    assert!(text(&shown).contains("mean") && !shown.contains(&0x1b), "{:?}", text(&shown));
}

/// Modes cannot be told apart by answers of which none is right, even with all pairs at 16 bits.
#[test]
fn longbench_says_where_its_scores_say_nothing() {
    let folder = folder("nothing");
    let ask = |answer: &str| {
        let item = longbench_item(0, "The password of kose is zesi rere bago.", "Recall kose", answer);
        fs::write(folder.join("triviaqa.jsonl"), item.to_string()).unwrap();
        let said = succeed(&["longbench", "--data", folder.to_str().unwrap(), "--kv", "full,kivi"]).stderr;
        text(&said).contains("note: full scores nothing either")
    };
    assert!(ask("48317"));
    assert!(!ask("zesi rere bago"));
}
