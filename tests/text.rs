//! Tokenizer streaming and the sampler.

use std::path::Path;

use specache::error::Error;
use specache::model::GenerationConfig;
use specache::sampler::{Sampler, SamplingOptions, SamplingOverrides, argmax};
use specache::tokenizer::Tokenizer;

fn tokenizer() -> Tokenizer {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/recall");
    Tokenizer::load(&dir).unwrap().unwrap()
}

// Streaming. The recall tokenizer is a byte-level BPE that knows English words only.

/// Feeds ids one by one: the pieces, the rest that `flush` returns included.
fn pieces(tokenizer: &Tokenizer, context: &[u32], ids: &[u32]) -> Vec<String> {
    let mut stream = tokenizer.stream(context);
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    pieces.push(stream.flush().unwrap());
    pieces
}

#[test]
fn streams_whole_characters() {
    let tokenizer = tokenizer();
    for text in ["Recall kose", "é", "naïve café", "🦀", "a🦀b👩‍🚀c", "日本語 ж", "\u{FFFD} kept", "line\n\n end "]
    {
        let ids = tokenizer.encode(text, false).unwrap();
        let pieces = pieces(&tokenizer, &[], &ids);
        assert_eq!(pieces.concat(), text);
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        if !text.contains('\u{FFFD}') {
            assert!(pieces.iter().all(|p| !p.contains('\u{FFFD}')), "{pieces:?}");
        }
    }
}

#[test]
fn holds_back_parts_of_a_character() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode("🦀", false).unwrap();
    assert_eq!(ids.len(), 4, "a byte each");
    assert_eq!(pieces(&tokenizer, &[], &ids), ["", "", "", "🦀", ""]);
    assert_eq!(pieces(&tokenizer, &[], &ids[..3]), ["", "", "", "\u{FFFD}"], "cut off: one replacement");
}

#[test]
fn continues_a_context() {
    let tokenizer = tokenizer();
    let text = "The password of kose 🦀 zesi rere.";
    let ids = tokenizer.encode(text, false).unwrap();
    for cut in 0..=ids.len() {
        let (context, rest) = ids.split_at(cut);
        let before = tokenizer.decode(context).unwrap();
        if !before.ends_with('\u{FFFD}') {
            assert_eq!(before + &pieces(&tokenizer, context, rest).concat(), text, "cut at {cut}");
        }
    }
}

/// A tokenizer as Llama 2 and Mistral have it: spaces as U+2581, bytes as `<0xNN>`, and a decoder that drops the space
/// before the first token.
fn sentencepiece(test: &str) -> Tokenizer {
    let words = ["<unk>", "<s>", "</s>", "\u{2581}", "\u{2581}the", "\u{2581}cat", "s"].map(String::from);
    let bytes = (0..=255).map(|b| format!("<0x{b:02X}>"));
    let vocab: serde_json::Map<_, _> = words.into_iter().chain(bytes).zip(0..).map(|(t, i)| (t, i.into())).collect();
    let json = serde_json::json!({
        "version": "1.0",
        "added_tokens": [{"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                  "merges": []},
    });
    let dir = std::env::temp_dir().join(format!("specache-{}-{test}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
    let tokenizer = Tokenizer::load(&dir).unwrap().unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    tokenizer
}

#[test]
fn streams_sentencepiece() {
    let tokenizer = sentencepiece("sentencepiece");
    let byte = |b: u8| 7 + u32::from(b);
    let (the, cat, s) = (4, 5, 6);
    let crab: Vec<u32> = "🦀".bytes().map(byte).collect();
    assert_eq!(pieces(&tokenizer, &[], &[1, the, cat, s]), ["", "the", " cat", "s", ""]);
    assert_eq!(pieces(&tokenizer, &[1, the], &[cat, s]), [" cat", "s", ""], "not the first token of the text");
    let two_crabs = [&[the][..], &crab, &crab, &[cat]].concat();
    assert_eq!(pieces(&tokenizer, &[], &two_crabs), ["the", "", "", "", "🦀", "", "", "", "🦀", " cat", ""]);
    // This decoder replaces every byte of a run that is not UTF-8 as a whole.
    assert_eq!(pieces(&tokenizer, &[], &[the, byte(0xFF), cat]), ["the", "", "\u{FFFD} cat", ""]);
    assert_eq!(pieces(&tokenizer, &[], &crab[..2]), ["", "", "\u{FFFD}\u{FFFD}"]);
}

#[test]
fn bytes_that_are_no_text_do_not_wait_forever() {
    let tokenizer = tokenizer();
    let continuation = tokenizer.encode("🦀", false).unwrap()[1];
    let mut stream = tokenizer.stream(&[]);
    let shown = (0..64).map(|_| stream.push(continuation).unwrap().chars().count()).sum::<usize>();
    assert!(shown >= 48, "{shown} of 64 shown");
}

#[test]
fn special_tokens_are_silent() {
    let tokenizer = tokenizer();
    let mut ids = vec![0];
    ids.extend(tokenizer.encode("Recall", false).unwrap());
    ids.push(1);
    assert_eq!(pieces(&tokenizer, &[], &ids).concat(), "Recall");
    assert_eq!(tokenizer.token_to_id("</s>"), Some(1));
    assert_eq!(tokenizer.n_ids(), 1412);
}

// Options.

#[test]
fn options_from_layers() {
    let cli = SamplingOverrides::default();
    let file = GenerationConfig { temperature: Some(0.6), top_p: Some(0.9), top_k: Some(50), ..Default::default() };
    let greedy = SamplingOptions::from_layers(&cli, &file).unwrap();
    assert_eq!((greedy.temperature, greedy.top_p, greedy.top_k), (0.0, 0.9, 50), "do_sample is absent");

    let file = GenerationConfig { do_sample: Some(true), ..file };
    assert_eq!(SamplingOptions::from_layers(&cli, &file).unwrap().temperature, 0.6);
    let file = GenerationConfig { temperature: None, ..file };
    assert_eq!(SamplingOptions::from_layers(&cli, &file).unwrap().temperature, 1.0);

    let cli = SamplingOverrides { temperature: Some(0.3), top_p: Some(1.0), seed: Some(7), ..cli };
    let options = SamplingOptions::from_layers(&cli, &GenerationConfig { do_sample: Some(false), ..file }).unwrap();
    assert_eq!((options.temperature, options.top_p, options.top_k, options.seed), (0.3, 1.0, 50, 7));
}

#[test]
fn options_out_of_range() {
    let bad = |options: SamplingOptions, option: &str| {
        let error = options.validate().unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(option) && error.to_string().contains("must be"), "{error}");
    };
    let ok = SamplingOptions::default();
    for x in [-0.1, f32::NAN, f32::INFINITY] {
        bad(SamplingOptions { temperature: x, ..ok }, "--temp");
        bad(SamplingOptions { repeat_penalty: x, ..ok }, "--repeat-penalty");
    }
    for x in [0.0, 1.1, -1.0, f32::NAN] {
        bad(SamplingOptions { top_p: x, ..ok }, "--top-p");
    }
    for x in [1.0, -0.1, f32::NAN] {
        bad(SamplingOptions { min_p: x, ..ok }, "--min-p");
    }
    bad(SamplingOptions { repeat_penalty: 0.0, ..ok }, "--repeat-penalty");
    ok.validate().unwrap();
}

// Sampling.

fn sampler(options: SamplingOptions) -> Sampler {
    Sampler::new(options).unwrap()
}

const WARM: SamplingOptions =
    SamplingOptions { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repeat_penalty: 1.0, seed: 1 };

/// Draws often: how many times each token came.
fn counts(options: SamplingOptions, logits: &[f32], history: &[u32], draws: usize) -> Vec<usize> {
    let mut sampler = sampler(options);
    let mut counts = vec![0; logits.len()];
    for _ in 0..draws {
        counts[sampler.sample(logits, history).unwrap() as usize] += 1;
    }
    counts
}

/// `ln` of probabilities.
fn logits(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln()).collect()
}

#[test]
fn argmax_takes_the_lower_of_equals() {
    assert_eq!(argmax(&[]), 0);
    assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
    assert_eq!(argmax(&[f32::NAN, -5.0, f32::NAN]), 1);
    assert_eq!(argmax(&[f32::NEG_INFINITY; 3]), 0);
    for n in [1, 15, 16, 17, 33, 1000] {
        for i in [0, n / 2, n - 1] {
            let mut xs = vec![-1.0; n];
            xs[i] = -0.5;
            assert_eq!(argmax(&xs), i as u32, "{i} of {n}");
        }
    }
}

#[test]
fn not_finite_logits() {
    for options in [SamplingOptions::default(), WARM] {
        let mut sampler = sampler(options);
        for bad in [&[1.0, f32::NAN][..], &[f32::INFINITY, 0.0], &[f32::NEG_INFINITY; 4], &[]] {
            assert!(matches!(sampler.sample(bad, &[]), Err(Error::NotFinite(_))), "{bad:?}");
        }
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY, 0.0], &[]).unwrap(), 1, "one -inf only forbids its token");
    }
}

#[test]
fn same_seed_same_tokens() {
    let logits: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin()).collect();
    let run = |seed| {
        let mut sampler = sampler(SamplingOptions { seed, ..WARM });
        (0..50).map(|_| sampler.sample(&logits, &[]).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(run(3), run(3));
    assert_ne!(run(3), run(4));
}

#[test]
fn draws_follow_the_probabilities() {
    let p = [0.5, 0.3, 0.15, 0.05];
    let n = 20_000;
    for (count, p) in counts(WARM, &logits(&p), &[], n).into_iter().zip(p) {
        let sd = (n as f32 * p * (1.0 - p)).sqrt();
        assert!((count as f32 - n as f32 * p).abs() < 5.0 * sd, "{count} draws of a token with p = {p}");
    }
}

#[test]
fn temperature_sharpens() {
    let cold = SamplingOptions { temperature: 1e-30, ..WARM };
    assert_eq!(counts(cold, &[1.0, 1.1, 0.9], &[], 100), [0, 100, 0]);
    let p = counts(SamplingOptions { temperature: 0.5, ..WARM }, &logits(&[0.6, 0.4]), &[], 20_000);
    // Squares, normalised: 0.36 / 0.52.
    assert!((p[0] as f32 / 20_000.0 - 0.6923).abs() < 0.02, "{p:?}");
}

/// Which tokens can be drawn at all.
fn support(options: SamplingOptions, p: &[f32]) -> Vec<usize> {
    let counts = counts(options, &logits(p), &[], 5_000);
    (0..p.len()).filter(|&i| counts[i] > 0).collect()
}

#[test]
fn filters() {
    let p = [0.05, 0.5, 0.15, 0.3];
    assert_eq!(support(SamplingOptions { top_k: 2, ..WARM }, &p), [1, 3]);
    assert_eq!(support(SamplingOptions { top_k: 9, ..WARM }, &p), [0, 1, 2, 3]);
    assert_eq!(support(SamplingOptions { top_k: 1, ..WARM }, &[0.4, 0.4, 0.2]), [0, 1], "ties with the k-th stay");
    assert_eq!(support(SamplingOptions { top_p: 0.7, ..WARM }, &p), [1, 3]);
    assert_eq!(support(SamplingOptions { top_p: 0.81, ..WARM }, &p), [1, 2, 3]);
    assert_eq!(support(SamplingOptions { top_p: 1e-6, ..WARM }, &p), [1], "the best always stays");
    assert_eq!(support(SamplingOptions { min_p: 0.25, ..WARM }, &p), [1, 2, 3]);
    assert_eq!(support(SamplingOptions { min_p: 0.9, ..WARM }, &p), [1]);
    // top-p counts what top-k has left: 0.5 / 0.8 reaches 0.6 alone.
    assert_eq!(support(SamplingOptions { top_k: 2, top_p: 0.6, ..WARM }, &p), [1]);
}

#[test]
fn top_p_of_a_flat_distribution() {
    let p = [0.1; 10];
    assert_eq!(support(SamplingOptions { top_p: 0.35, ..WARM }, &p), [0, 1, 2, 3], "ties go to the lower id");
}

#[test]
fn repeat_penalty_counts_once_and_hits_both_signs() {
    let greedy = SamplingOptions { repeat_penalty: 1.5, ..SamplingOptions::default() };
    assert_eq!(sampler(greedy).sample(&[3.0, 2.5, -1.0], &[0]).unwrap(), 1);
    assert_eq!(sampler(greedy).sample(&[3.0, 1.9, -1.0], &[0, 0, 0]).unwrap(), 0, "2.0, however often");
    assert_eq!(sampler(greedy).sample(&[-1.0, -1.2], &[0]).unwrap(), 1, "-1.5");
    assert_eq!(sampler(greedy).sample(&[-1.0, -1.2], &[0, 1, 99]).unwrap(), 0, "an id beyond the logits is ignored");
}
