//! What the C interface costs per decoded token, beside the engine's own functions doing the same.
//!
//! `cargo bench --bench capi [-- TOKENS]`: both sides take turns, token by token or in short runs, each with a session of its
//! own of the same tokens, so that whatever else runs on the machine meets both. What is looked for is a hundredth of a
//! step, so: mode `full`, as the interface costs the same in each and other modes hand work to other threads; processor
//! time, as a shared machine lets a step wait; the fastest tenth beside the medians. A minute at most.
#![allow(unsafe_code)] // Calls of C functions.

use std::ffi::{CString, c_void};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::ptr;

use specache::capi::*;
use specache::device::DeviceOptions;
use specache::model::config_of;
use specache::sampler::{Sampler, SamplingOptions};
use specache::tokenizer::Tokenizer;
use specache::{Buffers, Engine, KvMode, KvOptions, Next, Prompt, Result, Session};

const RECALL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/recall");
/// Tokens of a run of generation: as those of the command line, short enough to take turns.
const RUN: usize = 16;
/// Sequences of a batch.
const BATCH: usize = 8;

/// Nanoseconds of processor time, over all threads.
fn ns(run: impl FnOnce()) -> f64 {
    let now = || {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: a place for the answer.
        assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) }, 0);
        time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
    };
    let start = now();
    run();
    now() - start
}

/// A quantile, in microseconds.
fn quantile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[(values.len() as f64 * share) as usize] / 1e3
}

/// Both sides, in nanoseconds per token.
fn report(what: &str, model: &str, engine: Vec<f64>, c: Vec<f64>) {
    let differences: Vec<f64> = c.iter().zip(&engine).map(|(c, engine)| c - engine).collect();
    let [tenth, half] = [0.1, 0.5].map(|share| (quantile(&engine, share), quantile(&c, share)));
    println!(
        "| {what} | {model} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} |",
        tenth.0,
        tenth.1,
        tenth.1 - tenth.0,
        half.0,
        half.1,
        quantile(&differences, 0.5)
    );
}

unsafe extern "C" fn take(user_data: *mut c_void, token: *const TokenC) -> i32 {
    // SAFETY: the caller passes a number that nobody else uses.
    unsafe { *user_data.cast::<u64>() += (*token).n_bytes };
    0
}

/// The same model twice: an engine, and a handle.
struct Sides {
    engine: Engine,
    handle: *mut EngineHandle,
    tokens: usize,
}

impl Sides {
    fn open(model: &str, tokens: usize) -> Result<Sides> {
        let engine = Engine::load(model, &DeviceOptions { threads: Some(1), ..DeviceOptions::default() })?;
        let (model, mut handle) = (CString::new(model).expect("no NUL"), ptr::null_mut());
        // SAFETY: zero is a value of every field.
        let mut options: EngineOptions = unsafe { std::mem::zeroed() };
        // SAFETY: structs of this function, here and below.
        unsafe { specache_engine_options_init(&mut options, size_of::<EngineOptions>() as u32) };
        options.threads = 1;
        // SAFETY: as above.
        let status = unsafe { specache_engine_create(SPECACHE_ABI_VERSION, model.as_ptr(), &options, &mut handle) };
        assert_eq!(status, 0);
        Ok(Sides { engine, handle, tokens })
    }

    /// Both with the same prompt, and room for all tokens.
    fn sessions(&self, prompt: &[u32]) -> Result<(Session, *mut SessionHandle)> {
        let room = prompt.len() + self.tokens + RUN + 2;
        let mut session = self.engine.session(KvOptions { mode: KvMode::Full, ..KvOptions::default() }, room)?;
        self.engine.prefill(&mut [Prompt { session: &mut session, tokens: prompt }], &mut Buffers::default())?;
        // SAFETY: zero is a value of every field.
        let (mut handle, mut kv) = (ptr::null_mut(), unsafe { std::mem::zeroed::<KvOptionsC>() });
        // SAFETY: pointers of this function.
        unsafe {
            assert_eq!(specache_kv_options_init(&mut kv, size_of::<KvOptionsC>() as u32), 0);
            kv.mode = 0;
            assert_eq!(specache_session_create(self.handle, &kv, room as u64, &mut handle), 0);
            assert_eq!(specache_session_prefill(handle, prompt.as_ptr(), prompt.len()), 0);
        }
        Ok((session, handle))
    }

    /// Steps, one call each, with logits out or without.
    fn steps(&self, model: &str, prompt: &[u32], out: bool) -> Result<()> {
        let (mut session, handle) = self.sessions(prompt)?;
        let vocab = self.engine.model().config.vocab_size;
        let (mut buffers, mut logits) = (Buffers::default(), vec![0.0f32; vocab]);
        let (to, n) = if out { (logits.as_mut_ptr(), vocab) } else { (ptr::null_mut(), 0) };
        let (mut own, mut c) = (Vec::new(), Vec::new());
        for t in 0..self.tokens {
            let token = (t * 7 % vocab) as u32;
            let mut done = Ok(());
            own.push(ns(|| done = self.engine.decode(&mut [Next { session: &mut session, token }], &mut buffers)));
            done?;
            // SAFETY: room for the vocabulary, or NULL.
            c.push(ns(|| assert_eq!(unsafe { specache_session_step(handle, token, to, n) }, 0)));
        }
        let mut got = 0;
        // SAFETY: room for the vocabulary.
        assert_eq!(unsafe { specache_session_logits(handle, logits.as_mut_ptr(), vocab, &mut got) }, 0);
        assert_eq!(logits, buffers.logits(0)?, "both sides do the same");
        specache_session_free(handle);
        report(if out { "a step, logits copied out" } else { "a step" }, model, own, c);
        Ok(())
    }

    /// Batched steps, each sequence's next token the one that is chosen for it. The time is that of the whole batch.
    fn batches(&self, model: &str, prompt: &[u32]) -> Result<()> {
        let mut sessions = (0..BATCH).map(|_| self.sessions(prompt)).collect::<Result<Vec<_>>>()?;
        let (mut buffers, mut history) = (Buffers::default(), vec![prompt.to_vec(); BATCH]);
        let mut sampler = Sampler::new(SamplingOptions::default())?;
        let mut tokens = [prompt[0]; BATCH];
        let mut steps: Vec<Step> = sessions.iter().map(|(_, session)| step(*session, prompt[0])).collect();
        let (mut own, mut c) = (Vec::new(), Vec::new());
        for _ in 0..self.tokens / BATCH {
            let mut run = || -> Result<()> {
                let members = sessions.iter_mut().zip(tokens);
                let mut batch: Vec<Next> = members.map(|((session, _), token)| Next { session, token }).collect();
                self.engine.decode(&mut batch, &mut buffers)?;
                for (i, (token, history)) in tokens.iter_mut().zip(&mut history).enumerate() {
                    history.push(*token);
                    *token = buffers.sample(i, &mut sampler, history)?;
                }
                Ok(())
            };
            let mut done = Ok(());
            own.push(ns(|| done = run()));
            done?;
            // SAFETY: as many steps as there are.
            let all = |steps: &mut [Step]| unsafe { specache_step_batch(steps.as_mut_ptr(), BATCH, size_of::<Step>()) };
            c.push(ns(|| assert_eq!(all(&mut steps), 0)));
            steps.iter_mut().for_each(|step| step.token = step.next);
            assert!(steps.iter().map(|step| step.token).eq(tokens), "both sides do the same");
        }
        sessions.into_iter().for_each(|(_, session)| specache_session_free(session));
        report(&format!("a batch of {BATCH} steps"), model, own, c);
        Ok(())
    }

    /// Greedy generation in runs, with or without text.
    fn generation(&self, model: &str, prompt: &[u32], tokenizer: Option<&Tokenizer>) -> Result<()> {
        let (mut session, handle) = self.sessions(prompt)?;
        let mut buffers = Buffers::default();
        let mut sampler = Sampler::new(SamplingOptions::default())?;
        let mut history = prompt.to_vec();
        let (mut own, mut c, mut own_bytes, mut c_bytes) = (Vec::new(), Vec::new(), 0u64, 0u64);
        // The first token of both comes from a step, so that every run is of as many steps as tokens.
        let mut token = prompt[0];
        // SAFETY: NULL is allowed.
        assert_eq!(unsafe { specache_session_step(handle, token, ptr::null_mut(), 0) }, 0);
        self.engine.decode(&mut [Next { session: &mut session, token }], &mut buffers)?;
        history.push(token);
        token = sampler.sample(buffers.logits(0)?, &history)?;
        let mut generated = 0;
        // SAFETY: NULL is allowed.
        let status =
            unsafe { specache_session_generate(handle, 1, 3, None, ptr::null_mut(), &mut generated, ptr::null_mut()) };
        assert_eq!((status, generated), (0, 1));
        for _ in 0..self.tokens / RUN {
            let mut run = || -> Result<()> {
                let mut stream = tokenizer.map(|t| t.stream(&history));
                for _ in 0..RUN {
                    self.engine.decode(&mut [Next { session: &mut session, token }], &mut buffers)?;
                    history.push(token);
                    token = sampler.sample(buffers.logits(0)?, &history)?;
                    own_bytes += stream.as_mut().map_or(Ok(String::new()), |s| s.push(token))?.len() as u64;
                }
                own_bytes += stream.as_mut().map_or(Ok(String::new()), |s| s.flush())?.len() as u64;
                Ok(())
            };
            let mut done = Ok(());
            own.push(ns(|| done = run()) / RUN as f64);
            done?;
            let flags = if tokenizer.is_some() { 1 } else { 3 };
            let user_data = (&raw mut c_bytes).cast();
            c.push(
                ns(|| {
                    // SAFETY: values of this function.
                    let status = unsafe {
                        let (n, stop) = (ptr::null_mut(), ptr::null_mut());
                        specache_session_generate(handle, RUN as u64, flags, Some(take), user_data, n, stop)
                    };
                    assert_eq!(status, 0);
                }) / RUN as f64,
            );
        }
        assert_eq!(own_bytes, c_bytes, "both sides do the same");
        specache_session_free(handle);
        let text = if tokenizer.is_some() { "with text" } else { "ids alone" };
        report(&format!("a token of generate, {text}"), model, own, c);
        Ok(())
    }
}

fn step(session: *mut SessionHandle, token: u32) -> Step {
    Step { session, logits: ptr::null_mut(), n_logits: 0, token, next: 0, status: 0, reserved: 0 }
}

/// A model of one layer, whose weights are zero, with the vocabulary of Llama 3: what is moved of it shows most.
fn large_vocabulary() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("large-vocabulary");
    let config = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true, "max_position_embeddings": 8192, "dtype": "bfloat16", "eos_token_id": 1}"#;
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let square = ["q", "k", "v", "o"].map(|name| layer(&format!("self_attn.{name}_proj")));
    let square = square.into_iter().chain(["gate", "up", "down"].map(|name| layer(&format!("mlp.{name}_proj"))));
    let norms = [layer("input_layernorm"), layer("post_attention_layernorm"), "model.norm.weight".into()];
    let tensors = [("model.embed_tokens.weight".to_string(), vec![128_256, 32])].into_iter();
    let tensors = tensors.chain(square.map(|name| (name, vec![32, 32]))).chain(norms.map(|name| (name, vec![32])));
    let (mut end, mut entries) = (0, Vec::new());
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        entries.push(format!(r#""{name}": {{"dtype": "BF16", "shape": {shape:?}, "data_offsets": [{start}, {end}]}}"#));
    }
    let header = format!("{{{}}}", entries.join(", "));
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("config.json"), config)?;
        let mut file = std::fs::File::create(folder.join("model.safetensors"))?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        file.set_len((8 + header.len() + end) as u64) // zeros
    };
    write().expect("a small model");
    folder
}

/// The least that a call costs: find the session, lock it, catch panics.
fn bare_call(sides: &Sides) -> Result<()> {
    let (_, handle) = sides.sessions(&[1])?;
    let calls = 100_000;
    let runs = (0..9).map(|_| {
        ns(|| {
            for _ in 0..calls {
                let mut n = 0;
                // SAFETY: a number of this function.
                assert_eq!(unsafe { specache_session_tokens(handle, ptr::null_mut(), 0, &mut n) }, 0);
            }
        }) / calls as f64
    });
    println!("\nA call that does nothing: {:.0} ns.", quantile(&runs.collect::<Vec<_>>(), 0.5) * 1e3);
    specache_session_free(handle);
    Ok(())
}

fn main() -> Result<()> {
    let tokens = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(4000);
    println!(
        "| processor time per token, us | model | engine, 10 % | C, 10 % | more | engine, 50 % | C, 50 % | more |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let tiny = Sides::open("synthetic:tiny", tokens)?;
    let vocab = config_of("synthetic:tiny")?.vocab_size as u32;
    let prompt: Vec<u32> = (0..64).map(|i| i % vocab).collect();
    tiny.steps("synthetic:tiny", &prompt, true)?;
    tiny.steps("synthetic:tiny", &prompt, false)?;
    tiny.batches("synthetic:tiny", &prompt)?;
    tiny.generation("synthetic:tiny", &prompt, None)?;
    let recall = Sides::open(RECALL, tokens)?;
    let tokenizer = Tokenizer::load(RECALL.as_ref())?.expect("a tokenizer");
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/recall_prompt.txt"));
    let prompt = tokenizer.encode(&text.expect("a fixture")[..400], true)?;
    recall.steps("recall", &prompt, true)?;
    recall.generation("recall", &prompt, None)?;
    recall.generation("recall", &prompt, Some(&tokenizer))?;
    let folder = large_vocabulary();
    let large = Sides::open(folder.to_str().expect("UTF-8"), tokens)?;
    large.steps("128,256 tokens", &[1], true)?;
    large.steps("128,256 tokens", &[1], false)?;
    large.batches("128,256 tokens", &[1])?;
    bare_call(&tiny)?;
    specache_engine_free(large.handle);
    specache_engine_free(tiny.handle);
    specache_engine_free(recall.handle);
    Ok(())
}
