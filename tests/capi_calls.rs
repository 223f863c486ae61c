//! The C interface, call by call: what it gives, and what bad input comes to. In Rust, so that it runs under sanitizers;
//! tests/capi.rs does it from C and Python.
#![allow(unsafe_code)] // Calls of C functions.

mod common;

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use common::capi::*;
use common::fixture;
use specache::capi;

const NULL_ENGINE: EnginePtr = ptr::null_mut();
const NULL_SESSION: SessionPtr = ptr::null_mut();

fn prompt_text() -> String {
    std::fs::read_to_string(fixture("recall_prompt.txt")).unwrap()
}

fn free(session: SessionPtr) {
    specache_session_free(session);
}

/// An engine whose sessions are all gone holds no page.
fn close(engine: EnginePtr) {
    let memory = memory(engine);
    assert_eq!((memory.host_pages_leased, memory.host_pages_reserved, memory.device_kv_bytes), (0, 0, 0));
    specache_engine_free(engine);
}

/// The same ids and text as the command line, with the same options.
#[test]
fn tokens_are_those_of_the_command_line() {
    let engine = recall();
    let prompt = fixture("recall_prompt.txt");
    let ids = tokenize(engine, &prompt_text());
    for (mode, name) in ["full", "kivi", "offload", "fetch", "specache"].into_iter().enumerate() {
        for (temperature, seed) in [(0.0, 0), (1.5, 7)] {
            let mut cli = common::command(&[]);
            let output = cli
                .args(["generate", "-m", fixture("recall").to_str().unwrap(), "-f", prompt.to_str().unwrap()])
                .args(["-n", "40", "--json", "--ignore-eos", "--kv-bits", "1", "--kv-top-k", "16", "--kv", name])
                .args(["--device", "cpu", "--repeat-penalty", "1.1", "--top-p", "0.95"])
                .args(["--temp", &format!("{temperature}"), "--seed", &format!("{seed}")])
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();

            let kv = KvOptionsC { mode: mode as i32, bits: 1, top_k: 16, ..kv_options() };
            let session = session(engine, &kv, ids.len() as u64 + 40);
            // SAFETY: zero is a value of every field.
            let mut sampling: SamplingOptionsC = unsafe { std::mem::zeroed() };
            let size = size_of::<SamplingOptionsC>() as u32;
            // SAFETY: a struct of this function, here and below.
            ok(unsafe { specache_sampling_options_init(engine, &mut sampling, size) });
            sampling = SamplingOptionsC { temperature, seed, repeat_penalty: 1.1, top_p: 0.95, ..sampling };
            // SAFETY: as above.
            ok(unsafe { specache_session_set_sampling(session, &sampling) });
            ok(prefill(session, &ids));
            // In pieces: each call goes on where the one before ended.
            let (mut given, mut text) = (Vec::new(), String::new());
            for n in [1, 0, 24, 15] {
                let (status, shown, stop) = generate(session, n, 1, None);
                ok(status);
                assert_eq!((shown.ids.len() as u64, stop), (n, 0));
                given.extend(shown.ids);
                text += &shown.text;
            }
            let expected: Vec<u32> = serde_json::from_value(json["tokens"].clone()).unwrap();
            assert_eq!((given, text.as_str()), (expected, json["text"].as_str().unwrap()), "{name} {temperature}");
            let stats = stats(session);
            assert_eq!((stats.steps, stats.exposed_steps), (39, 39));
            let close = |a: f64, b: &serde_json::Value| b.as_f64().is_none_or(|b| (a - b).abs() < 1e-9);
            let figures = &json["specache"];
            assert!(close(stats.acceptance, &figures["acceptance"]) && close(stats.hit_rate, &figures["hit_rate"]));
            assert!(close(stats.fetched_bytes as f64 / 39.0, &figures["fetched_bytes_per_step"]));
            assert_eq!(json["cache"]["host_bytes"].as_u64(), Some(stats.host_bytes));
            free(session);
        }
    }
    close(engine);
}

/// Steps, batches, forks and generations all give the same logits and tokens.
#[test]
fn one_step_is_like_another() {
    let engine = recall();
    let ids = tokenize(engine, &prompt_text());
    let prompts = [&ids[..], &ids[..200], &ids[100..]];
    let n = 24;
    let lone: Vec<Vec<u32>> = prompts
        .iter()
        .map(|prompt| {
            let session = session(engine, &kv_options(), 1100);
            ok(prefill(session, prompt));
            let (status, shown, _) = generate(session, n as u64, 1, None);
            ok(status);
            // The last token is chosen and not fed: it counts as soon as it is.
            assert_eq!(tokens(session).len(), prompt.len() + n - 1);
            ok(step(session, *shown.ids.last().unwrap()));
            assert_eq!(tokens(session), [prompt, &shown.ids[..]].concat());
            free(session);
            shown.ids
        })
        .collect();

    let sessions = prompts.map(|prompt| {
        let session = session(engine, &kv_options(), 1100);
        ok(prefill(session, prompt));
        session
    });
    let fork = fork(sessions[0]);
    let vocab = logits(fork).len();
    assert_eq!(logits(fork), logits(sessions[0]));
    let mut rows = vec![vec![0.0f32; vocab]; 3];
    let mut steps: Vec<Step> = sessions
        .iter()
        .zip(&mut rows)
        .map(|(&session, row)| {
            let token = sample(session);
            let (logits, n_logits) = (row.as_mut_ptr(), vocab as u64);
            Step { session, logits, n_logits, token, next: 0, status: -1, reserved: 0 }
        })
        .collect();
    for t in 0..n - 1 {
        assert_eq!(steps.iter().map(|s| s.token).collect::<Vec<_>>(), lone.iter().map(|l| l[t]).collect::<Vec<_>>());
        // SAFETY: as many steps as there are, each with room for its logits.
        ok(unsafe { specache_step_batch(steps.as_mut_ptr(), steps.len(), size_of::<Step>()) });
        assert!(steps.iter().all(|step| step.status == 0));
        // The fork goes alone.
        let mut alone = vec![0.0f32; vocab];
        // SAFETY: room for the vocabulary.
        ok(unsafe { specache_session_step(fork, steps[0].token, alone.as_mut_ptr(), vocab) });
        // SAFETY: the row that the batch has filled, which nobody changes meanwhile.
        assert_eq!(alone, unsafe { std::slice::from_raw_parts(steps[0].logits, vocab) });
        assert_eq!(alone, logits(fork));
        steps.iter_mut().for_each(|step| step.token = step.next);
    }
    // A batch leaves logits with the sessions, and its choices with the caller.
    let (status, shown, _) = generate(sessions[1], 3, 1, None);
    ok(status);
    assert_eq!((shown.ids.len(), shown.ids[0]), (3, steps[1].next));
    assert_eq!(tokens(sessions[1]).len(), 200 + n - 1 + 2);
    sessions.into_iter().chain([fork]).for_each(free);
    close(engine);
}

/// Steps leave their logits where they are: whatever else is called meanwhile, each session finds its own.
#[test]
fn logits_wait_for_who_asks() {
    let engine = recall();
    let ids = tokenize(engine, &prompt_text());
    let prompts = [&ids[..90], &ids[10..170], &ids[20..85]];
    let begin = || {
        prompts.map(|prompt| {
            let one = session(engine, &kv_options(), 400);
            ok(prefill(one, prompt));
            one
        })
    };
    // Each step's logits, asked for at once.
    let fed: Vec<u32> = ids[200..206].to_vec();
    let asked = begin();
    let expected = asked.map(|one| {
        fed.iter()
            .map(|&token| {
                ok(step(one, token));
                logits(one)
            })
            .collect::<Vec<_>>()
    });

    let left = begin();
    let all = |sessions: &[SessionPtr], token| {
        let mut steps: Vec<Step> = sessions.iter().map(|&one| batched(one, token)).collect();
        ok(step_batch(&mut steps));
    };
    let found = |i: usize, t: usize| assert!(logits(left[i]) == expected[i][t], "session {i}, step {t}");
    // Alone, in turns.
    left.iter().for_each(|&one| ok(step(one, fed[0])));
    (0..3).for_each(|i| found(i, 0));
    // Of a batch; more than once.
    all(&left, fed[1]);
    (0..3).chain(0..3).for_each(|i| found(i, 1));
    // Of a batch, behind forks, a step of one of them alone, and a prompt and a generation of others.
    all(&left, fed[2]);
    let forks = [0, 1].map(|i| fork(left[i]));
    ok(step(left[0], fed[3]));
    ok(prefill(asked[0], &ids[..40]));
    ok(generate(asked[1], 5, 1, None).0);
    found(0, 3);
    (1..3).for_each(|i| found(i, 2));
    assert!(logits(forks[0]) == expected[0][2] && logits(forks[1]) == expected[1][2]);
    all(&left[1..], fed[3]);
    free(left[2]);
    // What a session chooses, and goes on with, is from them.
    let best = |row: &[f32]| (0..row.len()).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
    assert_eq!(sample(left[1]), best(&expected[1][3]));
    all(&left[..2], fed[4]);
    let (_, shown, _) = generate(left[0], 4, 1, None);
    assert_eq!(shown.ids[0], best(&expected[0][4]));
    // Also from those that a generation has left, behind which another one goes on.
    all(&left[1..2], fed[5]);
    assert_eq!(best(&logits(left[0])), *shown.ids.last().unwrap());
    found(1, 5);
    // A step that is refused takes nothing away.
    fails(step(left[1], u32::MAX), Status::Usage, "vocabulary");
    ok(specache_session_cancel(left[1]));
    fails(step(left[1], fed[0]), Status::Cancelled, "cancelled");
    found(1, 5);
    left[..2].iter().chain(&asked).chain(&forks).for_each(|&one| free(one));
    close(engine);
}

fn fork(session: SessionPtr) -> SessionPtr {
    let mut fork = ptr::null_mut();
    // SAFETY: a pointer of this function.
    ok(unsafe { specache_session_fork(session, &mut fork) });
    fork
}

/// Truncation, reset, more room, prompts behind prompts, ends of text.
#[test]
fn a_session_can_go_back_and_begin_anew() {
    let engine = recall();
    let ids = tokenize(engine, &prompt_text());
    let session = session(engine, &kv_options(), 64);
    ok(prefill(session, &ids)); // makes room for itself
    ok(specache_session_reserve(session, ids.len() as u64 + 60));
    let (_, first, _) = generate(session, 30, 1, Some(12));
    assert_eq!(first.ids.len(), 12, "the callback has ended it");

    // From the end of the prompt again: its last token fed anew gives the same.
    ok(specache_session_truncate(session, ids.len() as u64 - 1));
    let mut n = 0;
    // SAFETY: a number of this function.
    fails(unsafe { specache_session_logits(session, ptr::null_mut(), 0, &mut n) }, Status::Usage, "no logits");
    fails(generate(session, 1, 0, None).0, Status::Usage, "nothing to go on from");
    ok(step(session, *ids.last().unwrap()));
    assert_eq!(generate(session, 12, 1, None).1.ids, first.ids);

    ok(specache_session_reset(session));
    assert_eq!((tokens(session).len(), stats(session).steps), (0, 0));
    fails(step(session, 5), Status::Usage, "empty");
    ok(prefill(session, &ids));
    assert_eq!(generate(session, 12, 1, None).1.ids, first.ids);

    // A prompt behind a generation: the token that was chosen last is fed first.
    ok(prefill(session, &ids[..10]));
    let held = tokens(session);
    assert_eq!(held.len(), ids.len() + 12 + 10);
    assert_eq!(held[ids.len()..ids.len() + 12], first.ids);

    // Until there is no room: that is an end and not an error.
    let room = stats(session).max_tokens;
    let (status, shown, stop) = generate(session, 1 << 40, 1, None);
    ok(status);
    assert_eq!((stop, tokens(session).len() as u64), (2, room));
    assert_eq!(shown.ids.len() as u64, room - held.len() as u64 + 1);
    fails(step(session, 5), Status::Usage, "full");
    ok(specache_session_reserve(session, room + 10));
    assert_eq!(generate(session, 5, 1, None).2, 0);
    free(session);
    close(engine);
}

/// The end of a text is shown without text, and ends the generation unless it is to be ignored.
#[test]
fn ends_of_text() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi-eos");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("recall").join(file), folder.join(file)).unwrap();
    }
    let plain = recall();
    let ids = tokenize(plain, &prompt_text());
    let session_of = |engine| {
        let session = session(engine, &kv_options(), 1100);
        ok(prefill(session, &ids));
        session
    };
    let expected = generate(session_of(plain), 6, 0, None).1.ids;
    let eos = serde_json::json!({"eos_token_id": [7, expected[3]], "do_sample": true, "temperature": 0.5, "top_k": 3});
    std::fs::write(folder.join("generation_config.json"), eos.to_string()).unwrap();
    let engine = common::capi::engine(&folder, &engine_options());
    // SAFETY: `list` passes room for as many as it says.
    let known = list(0, |ids, capacity, n| unsafe { specache_engine_eos_tokens(engine, ids, capacity, n) });
    assert_eq!(known, [7, expected[3]]);

    // SAFETY: zero is a value of every field.
    let mut sampling: SamplingOptionsC = unsafe { std::mem::zeroed() };
    // SAFETY: a struct of this function.
    ok(unsafe { specache_sampling_options_init(engine, &mut sampling, size_of::<SamplingOptionsC>() as u32) });
    assert_eq!((sampling.temperature, sampling.top_k), (0.5, 3), "the model's own");
    sampling.temperature = 0.0;
    for (flags, n, stop) in [(0, 4, 1), (1, 6, 0)] {
        let session = session_of(engine);
        // SAFETY: as above.
        ok(unsafe { specache_session_set_sampling(session, &sampling) });
        let (status, shown, why) = generate(session, 6, flags, None);
        ok(status);
        assert_eq!((&shown.ids[..], why), (&expected[..n], stop));
        assert_eq!(shown.eos.iter().position(|&eos| eos), Some(3), "heeded or not");
        // Without text.
        ok(specache_session_reset(session));
        ok(prefill(session, &ids));
        let (_, silent, _) = generate(session, 6, flags | 2, None);
        assert_eq!((silent.ids, silent.text.as_str()), (shown.ids, ""));
        free(session);
    }
    specache_engine_free(engine);
    specache_engine_free(plain);
}

#[test]
fn text_and_back() {
    let engine = recall();
    let text = "The password of kose 🦀 zesi.";
    let ids = tokenize(engine, text);
    // SAFETY: `list` passes room for as many as it says.
    let bytes = list(0, |text: *mut c_char, capacity, n| unsafe {
        specache_detokenize(engine, ids.as_ptr(), ids.len(), text, capacity, n)
    });
    assert_eq!(bytes.iter().map(|&b| b as u8).collect::<Vec<_>>(), text.as_bytes());
    // One byte too little, for the NUL: nothing is written.
    let (mut small, mut n) = (vec![1 as c_char; text.len()], 0);
    // SAFETY: buffers of this function, with their lengths.
    let status =
        unsafe { specache_detokenize(engine, ids.as_ptr(), ids.len(), small.as_mut_ptr(), small.len(), &mut n) };
    fails(status, Status::Buffer, "are needed");
    assert!(n == text.len() && small.iter().all(|&b| b == 1));

    let bad = b"abc\xff";
    // SAFETY: as above.
    let tokenize =
        |flags| unsafe { specache_tokenize(engine, bad.as_ptr().cast(), bad.len(), flags, ptr::null_mut(), 0, &mut 0) };
    fails(tokenize(0), Status::Usage, "byte 3 is not valid UTF-8");
    let session = session(engine, &kv_options(), 64);
    // SAFETY: as above.
    let status = unsafe { specache_session_prefill_text(session, bad.as_ptr().cast(), bad.len(), 0) };
    fails(status, Status::Usage, "UTF-8");
    // SAFETY: as above.
    let status = unsafe { specache_session_prefill_text(session, text.as_ptr().cast(), text.len(), 64) };
    fails(status, Status::Usage, "0x40 is unknown");
    // SAFETY: as above.
    let status = unsafe { specache_detokenize(engine, [1u32, 5000].as_ptr(), 2, ptr::null_mut(), 0, &mut 0) };
    fails(status, Status::Usage, "entry 1 is 5000");
    let role = ChatMessage { role: c"user".as_ptr(), content: c"hi".as_ptr() };
    // SAFETY: as above.
    let status = unsafe { specache_chat_prompt(engine, &role, 1, 1, ptr::null_mut(), 0, &mut 0) };
    fails(status, Status::Usage, "no chat template");
    free(session);
    close(engine);

    let synthetic = common::capi::engine("synthetic:tiny".as_ref(), &engine_options());
    // SAFETY: as above.
    let status =
        unsafe { specache_tokenize(synthetic, text.as_ptr().cast(), text.len(), 0, ptr::null_mut(), 0, &mut 0) };
    fails(status, Status::Usage, "no tokenizer.json");
    close(synthetic);
}

/// A file that cannot be read, and a tokenizer without an id for a word: what the header names for them.
#[test]
fn failures_of_files() {
    let named = |function: &str, status: &str| {
        let header = include_str!("../include/specache.h");
        let (before, _) = header.split_once(&format!("int32_t {function}(")).unwrap();
        let (_, comment) = before.rsplit_once("/*").unwrap();
        assert!(comment.contains(status), "{function}: {comment}");
    };
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi-files");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    // A name that leads to itself.
    std::os::unix::fs::symlink("config.json", folder.join("config.json")).unwrap();
    let model = CString::new(folder.to_str().unwrap()).unwrap();
    // SAFETY: zero is a value of every field.
    let mut plan: MemoryPlan = unsafe { std::mem::zeroed() };
    plan.struct_size = size_of::<MemoryPlan>() as u32;
    // SAFETY: a C string and structs of this function.
    let status = unsafe { specache_plan(SPECACHE_ABI_VERSION, model.as_ptr(), ptr::null(), 100, &mut plan) };
    fails(status, Status::Failed, "config.json");
    named("specache_plan", "_FAILED");
    let mut none = NULL_ENGINE;
    // SAFETY: as above.
    let status = unsafe { specache_engine_create(SPECACHE_ABI_VERSION, model.as_ptr(), &engine_options(), &mut none) };
    fails(status, Status::Failed, "config.json");
    named("specache_engine_create", "_FAILED");

    std::fs::remove_file(folder.join("config.json")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture("recall").join(file), folder.join(file)).unwrap();
    }
    let tokenizer = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"known": 0}, "unk_token": "none"}}"#;
    std::fs::write(folder.join("tokenizer.json"), tokenizer).unwrap();
    let engine = common::capi::engine(&folder, &engine_options());
    assert_eq!(tokenize(engine, "known"), [0]);
    let mut n = 0;
    // SAFETY: texts of their own length, and NULL with no room.
    let status = unsafe { specache_tokenize(engine, c"new".as_ptr(), 3, 0, ptr::null_mut(), 0, &mut n) };
    fails(status, Status::Model, "tokenizer.json");
    named("specache_tokenize", "_MODEL");
    let one = session(engine, &kv_options(), 10);
    // SAFETY: as above.
    fails(unsafe { specache_session_prefill_text(one, c"new".as_ptr(), 3, 0) }, Status::Model, "tokenizer.json");
    free(one);
    close(engine);
}

#[test]
fn chats() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi-chat");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(fixture("recall").join(file), folder.join(file)).unwrap();
    }
    let template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}\
                    {% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}";
    std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    let engine = common::capi::engine(&folder, &engine_options());
    let chat = |role: &CStr, add| {
        let messages = [role, c"assistant"].map(|role| ChatMessage { role: role.as_ptr(), content: c"hé".as_ptr() });
        let mut n = 0;
        // SAFETY: messages of this function.
        let status = unsafe { specache_chat_prompt(engine, messages.as_ptr(), 2, add, ptr::null_mut(), 0, &mut n) };
        (status == 0).then(|| {
            // SAFETY: as above.
            let text = list(0, |text: *mut c_char, capacity, n| unsafe {
                specache_chat_prompt(engine, messages.as_ptr(), 2, add, text, capacity, n)
            });
            String::from_utf8(text.iter().map(|&b| b as u8).collect()).unwrap()
        })
    };
    assert_eq!(chat(c"user", 1).unwrap(), "<user>hé<assistant>hé<a>");
    assert_eq!(chat(c"user", 0).unwrap(), "<user>hé<assistant>hé");
    assert!(chat(c"system", 1).is_none() && last_error().contains("no system"));
    // SAFETY: no messages are read.
    let status = unsafe { specache_chat_prompt(engine, ptr::null(), 0, 1, ptr::null_mut(), 0, &mut 0) };
    fails(status, Status::Usage, "without messages");
    // SAFETY: NULL is refused.
    let status = unsafe {
        let message = ChatMessage { role: c"user".as_ptr(), content: ptr::null() };
        specache_chat_prompt(engine, &message, 1, 1, ptr::null_mut(), 0, &mut 0)
    };
    fails(status, Status::Usage, "content is NULL");
    close(engine);
}

/// Every function says what a wrong handle is.
#[test]
fn wrong_handles() {
    let engine = recall();
    let alive = session(engine, &kv_options(), 64);
    let freed = session(engine, &kv_options(), 64);
    free(freed);
    let freed_engine = recall();
    specache_engine_free(freed_engine);
    let mut n = 0;
    let sessions: [(SessionPtr, &str); 4] =
        [(NULL_SESSION, "NULL"), (freed, "freed"), (engine.cast(), "never was a session"), (64 as _, "never was")];
    for (session, words) in sessions {
        let mut handle = alive;
        // SAFETY: handles are names; all else is of this function or NULL.
        let statuses = unsafe {
            [
                specache_session_fork(session, &mut handle),
                specache_session_truncate(session, 1),
                specache_session_reset(session),
                specache_session_reserve(session, 1),
                specache_session_cancel(session),
                specache_session_clear_cancel(session),
                specache_session_prefill(session, [1].as_ptr(), 1),
                specache_session_prefill_text(session, c"a".as_ptr(), 1, 0),
                specache_session_prefill_chat(session, ptr::null(), 0, ptr::null_mut()),
                specache_session_set_sampling(session, ptr::null()),
                specache_session_generate(session, 1, 0, None, ptr::null_mut(), ptr::null_mut(), ptr::null_mut()),
                specache_session_step(session, 1, ptr::null_mut(), 0),
                specache_session_logits(session, ptr::null_mut(), 0, &mut n),
                specache_session_sample(session, &mut 0),
                specache_session_tokens(session, ptr::null_mut(), 0, &mut n),
                specache_session_get_stats(session, ptr::null_mut()),
                specache_session_layer_stats(session, ptr::null_mut(), 0, &mut n),
            ]
        };
        statuses.into_iter().for_each(|status| fails(status, Status::Handle, words));
        assert!(handle.is_null(), "a failed fork gives none");
        free(session);
    }
    let engines: [(EnginePtr, &str); 3] =
        [(NULL_ENGINE, "NULL"), (freed_engine, "freed"), (alive.cast(), "never was an engine")];
    for (engine, words) in engines {
        // SAFETY: as above.
        let statuses = unsafe {
            [
                specache_engine_model_info(engine, ptr::null_mut()),
                specache_engine_eos_tokens(engine, ptr::null_mut(), 0, &mut n),
                specache_engine_describe(engine, ptr::null_mut(), 0, &mut n),
                specache_engine_memory(engine, ptr::null_mut()),
                specache_engine_trace(engine, 1),
                specache_engine_measure_waits(engine, 1),
                specache_engine_trace_write(engine, c"x".as_ptr()),
                specache_tokenize(engine, c"a".as_ptr(), 1, 0, ptr::null_mut(), 0, &mut n),
                specache_detokenize(engine, [1].as_ptr(), 1, ptr::null_mut(), 0, &mut n),
                specache_chat_prompt(engine, ptr::null(), 0, 0, ptr::null_mut(), 0, &mut n),
                specache_session_create(engine, ptr::null(), 64, &mut ptr::null_mut()),
                specache_sampling_options_init(engine, ptr::null_mut(), 32),
            ]
        };
        statuses.into_iter().for_each(|status| fails(status, Status::Handle, words));
        specache_engine_free(engine);
    }
    // The living were not touched.
    ok(prefill(alive, &[1, 2]));
    let mut steps = [alive, freed].map(|session| Step {
        session,
        logits: ptr::null_mut(),
        n_logits: 0,
        token: 1,
        next: 0,
        status: 0,
        reserved: 0,
    });
    // SAFETY: two steps.
    fails(unsafe { specache_step_batch(steps.as_mut_ptr(), 2, size_of::<Step>()) }, Status::Handle, "step 1");
    assert_eq!((steps[0].status, steps[1].status), (0, Status::Handle as i32));
    assert!(steps[0].next < 1536 && tokens(alive).len() == 3, "the other has gone on");
    free(alive);
    close(engine);
}

/// NULL where something is needed.
#[test]
fn null_arguments() {
    let engine = recall();
    let alive = session(engine, &kv_options(), 64);
    let mut n = 0;
    // SAFETY: NULL is what is tried; all else is of this function.
    let statuses = unsafe {
        [
            specache_engine_create(1, ptr::null(), ptr::null(), &mut ptr::null_mut()),
            specache_engine_create(1, c"x".as_ptr(), ptr::null(), ptr::null_mut()),
            specache_engine_options_init(ptr::null_mut(), 64),
            specache_kv_options_init(ptr::null_mut(), 28),
            specache_sampling_options_init(engine, ptr::null_mut(), 32),
            specache_engine_model_info(engine, ptr::null_mut()),
            specache_engine_memory(engine, ptr::null_mut()),
            specache_engine_describe(engine, ptr::null_mut(), 0, ptr::null_mut()),
            specache_engine_describe(engine, ptr::null_mut(), 5, &mut n),
            specache_engine_eos_tokens(engine, ptr::null_mut(), 0, ptr::null_mut()),
            specache_tokenize(engine, ptr::null(), 3, 0, ptr::null_mut(), 0, &mut n),
            specache_detokenize(engine, ptr::null(), 3, ptr::null_mut(), 0, &mut n),
            specache_chat_prompt(engine, ptr::null(), 3, 0, ptr::null_mut(), 0, &mut n),
            specache_plan(1, ptr::null(), ptr::null(), 10, ptr::null_mut()),
            specache_plan(1, c"synthetic:tiny".as_ptr(), ptr::null(), 10, ptr::null_mut()),
            specache_session_create(engine, ptr::null(), 10, ptr::null_mut()),
            specache_session_fork(alive, ptr::null_mut()),
            specache_session_prefill(alive, ptr::null(), 3),
            specache_session_prefill(alive, ptr::null(), 0),
            specache_session_sample(alive, ptr::null_mut()),
            specache_session_tokens(alive, ptr::null_mut(), 0, ptr::null_mut()),
            specache_session_get_stats(alive, ptr::null_mut()),
            specache_session_layer_stats(alive, ptr::null_mut(), 0, ptr::null_mut()),
            specache_step_batch(ptr::null_mut(), 2, size_of::<Step>()),
        ]
    };
    // A model that has no template says so first, and an engine that is not traced.
    statuses.into_iter().enumerate().for_each(|(i, status)| assert_eq!(status, Status::Usage as i32, "call {i}"));
    // SAFETY: NULL is allowed for nothing at all.
    ok(unsafe { specache_step_batch(ptr::null_mut(), 0, size_of::<Step>()) });
    free(NULL_SESSION);
    specache_engine_free(NULL_ENGINE);
    free(alive);
    close(engine);
}

#[test]
fn versions_and_sizes() {
    let create = |version, options: &EngineOptions| {
        let mut engine = 8 as EnginePtr;
        // SAFETY: a C string and structs of this function.
        let status = unsafe { specache_engine_create(version, c"synthetic:tiny".as_ptr(), options, &mut engine) };
        assert_eq!(status == 0, !engine.is_null());
        specache_engine_free(engine);
        status
    };
    for (version, words) in [(0, "0.0"), (2, "0.2"), (0x1_0001, "1.1"), (u32::MAX, "65535.65535")] {
        fails(create(version, &engine_options()), Status::Abi, words);
    }
    assert_eq!(specache_abi_version(), SPECACHE_ABI_VERSION);
    for size in [0, 1, 4, 7, 9, 63, 65, 71, 73, 80, u32::MAX] {
        let options = EngineOptions { struct_size: size, ..engine_options() };
        fails(create(1, &options), Status::Abi, "struct_size of specache_engine_options");
        // SAFETY: a struct that is larger than what may be written.
        let status = unsafe { specache_engine_options_init(&mut engine_options(), size) };
        fails(status, Status::Abi, "struct_size");
    }

    // An older caller, whose struct ends early: what lies behind it is neither read nor written, and has its default.
    let bad = EngineOptions { struct_size: 8, threads: 2, device: ptr::dangling(), ..engine_options() };
    ok(create(1, &bad));
    ok(create(1, &EngineOptions { struct_size: 64, gather: 77, gather_threads: 7777, ..engine_options() }));
    let mut short = EngineOptions { device: ptr::dangling(), threads: 9, ..engine_options() };
    // SAFETY: a struct that is larger than what may be written.
    ok(unsafe { specache_engine_options_init(&mut short, 8) });
    assert_eq!((short.struct_size, short.threads, short.device), (8, 0, ptr::dangling()));

    let engine = recall();
    let kv = KvOptionsC { struct_size: 12, bits: 1, group_size: 5, residual_len: 1, dtype: 77, ..kv_options() };
    let with_defaults = session(engine, &kv, 64);
    fails(step(with_defaults, 1), Status::Usage, "empty");
    let mut stats = SessionStats { struct_size: 16, max_tokens: 5, ..stats(with_defaults) };
    // SAFETY: a struct of this function.
    ok(unsafe { specache_session_get_stats(with_defaults, &mut stats) });
    assert_eq!((stats.struct_size, stats.n_tokens, stats.max_tokens), (16, 0, 5), "only what it has room for");
    stats.struct_size = 15;
    // SAFETY: as above.
    fails(
        unsafe { specache_session_get_stats(with_defaults, &mut stats) },
        Status::Abi,
        "specache_session_stats is 15",
    );
    // SAFETY: no step is read.
    fails(unsafe { specache_step_batch(ptr::null_mut(), 0, 39) }, Status::Abi, "step_size 39");
    free(with_defaults);
    close(engine);
}

#[test]
fn options_out_of_range() {
    let create = |options: &EngineOptions| {
        let mut engine = ptr::null_mut();
        // SAFETY: a C string and structs of this function.
        unsafe { specache_engine_create(1, c"synthetic:tiny".as_ptr(), options, &mut engine) }
    };
    let device = |device: &CStr| create(&EngineOptions { device: device.as_ptr(), ..engine_options() });
    fails(device(c"tpu"), Status::Usage, "device \"tpu\": must be auto, cpu, cuda or cuda:N");
    // Without a driver the reason is that there is none, with one that there are not so many GPUs.
    let mut engine = ptr::null_mut();
    let no_such = EngineOptions { device: c"cuda:99".as_ptr(), ..engine_options() };
    // SAFETY: a C string and structs of this function.
    let status = unsafe { specache_engine_create(1, c"synthetic:tiny".as_ptr(), &no_such, &mut engine) };
    assert!(status == Status::Device as i32 || status == Status::Usage as i32, "{status}");
    fails(create(&EngineOptions { threads: 5000, ..engine_options() }), Status::Usage, "threads 5000");
    fails(create(&EngineOptions { linear: 3, ..engine_options() }), Status::Usage, "linear 3");
    fails(create(&EngineOptions { linear: -1, ..engine_options() }), Status::Usage, "linear -1");
    fails(create(&EngineOptions { linear: 2, ..engine_options() }), Status::Usage, "linear cublas needs a GPU");
    fails(create(&EngineOptions { gather: 4, ..engine_options() }), Status::Usage, "gather 4");
    fails(create(&EngineOptions { gather: 1, ..engine_options() }), Status::Usage, "gather gpu needs a GPU");
    fails(create(&EngineOptions { gather_threads: 257, ..engine_options() }), Status::Usage, "gather_threads 257");
    for log_level in [-1, 5, 77] {
        fails(
            create(&EngineOptions { log_level, ..engine_options() }),
            Status::Usage,
            &format!("log_level {log_level}"),
        );
    }
    for (model, status, words) in [
        (c"/no/such/folder", Status::Model, "no such folder"),
        (c"synthetic:no-such", Status::Usage, "no-such"),
        (c"\xff", Status::Usage, "UTF-8"),
    ] {
        // SAFETY: as above.
        fails(unsafe { specache_engine_create(1, model.as_ptr(), ptr::null(), &mut ptr::null_mut()) }, status, words);
        // SAFETY: as above.
        fails(unsafe { specache_plan(1, model.as_ptr(), ptr::null(), 9, ptr::null_mut()) }, status, words);
    }

    let engine = recall();
    let kv = kv_options();
    for (options, words) in [
        (KvOptionsC { mode: 5, ..kv }, "mode 5"),
        (KvOptionsC { mode: -1, ..kv }, "mode -1"),
        (KvOptionsC { bits: 3, ..kv }, "bits 3: must be 1, 2 or 4"),
        (KvOptionsC { group_size: 48, ..kv }, "group_size 48"),
        (KvOptionsC { residual_len: 0, ..kv }, "residual_len 0"),
        (KvOptionsC { top_k: u32::MAX, ..kv }, "top_k 4294967295"),
        (KvOptionsC { dtype: 9, ..kv }, "dtype 9"),
        (KvOptionsC { dtype: 3, ..kv }, "dtype fp32 works with mode full only"),
    ] {
        let mut session = 8 as SessionPtr;
        // SAFETY: structs of this function.
        fails(unsafe { specache_session_create(engine, &options, 64, &mut session) }, Status::Usage, words);
        assert!(session.is_null());
    }
    // SAFETY: as above.
    let status = unsafe { specache_session_create(engine, &kv, u64::MAX, &mut ptr::null_mut()) };
    fails(status, Status::Usage, "a context of");

    let alive = session(engine, &kv, 64);
    fails(prefill(alive, &[1, 1536]), Status::Usage, "token 1536 at place 1");
    // A token that was generated and not fed goes in front, and does not count for places.
    ok(prefill(alive, &[1, 2]));
    ok(generate(alive, 1, 1, None).0);
    fails(prefill(alive, &[1, 1536]), Status::Usage, "token 1536 at place 1");
    ok(specache_session_reset(alive));
    // SAFETY: the list is refused before it is read.
    let status = unsafe { specache_session_prefill(alive, ptr::dangling(), usize::MAX) };
    fails(status, Status::Usage, "too many");
    ok(prefill(alive, &[1, 2]));
    fails(step(alive, 1536), Status::Usage, "token 1536");
    fails(specache_session_truncate(alive, 0), Status::Usage, "from 1 to the 2");
    fails(specache_session_truncate(alive, 3), Status::Usage, "from 1 to the 2");
    fails(specache_session_reserve(alive, u64::MAX), Status::Usage, "a context of");
    fails(generate(alive, 1, 8, None).0, Status::Usage, "0x8 is unknown");
    let mut row = [0.0f32; 8];
    // SAFETY: room for as many as it says.
    fails(
        unsafe { specache_session_step(alive, 1, row.as_mut_ptr(), 8) },
        Status::Usage,
        "must be the vocabulary's 1536",
    );
    // SAFETY: NULL is refused.
    fails(unsafe { specache_session_step(alive, 1, ptr::null_mut(), 8) }, Status::Usage, "logits is NULL");
    let mut stop = 5;
    // SAFETY: values of this function.
    let status =
        unsafe { specache_session_generate(NULL_SESSION, 1, 0, None, ptr::null_mut(), ptr::null_mut(), &mut stop) };
    assert_eq!((status, stop), (Status::Handle as i32, -1), "no reason for an end");
    // SAFETY: zero is a value of every field.
    let mut sampling: SamplingOptionsC = unsafe { std::mem::zeroed() };
    // SAFETY: a struct of this function.
    ok(unsafe { specache_sampling_options_init(engine, &mut sampling, size_of::<SamplingOptionsC>() as u32) });
    for (options, words) in [
        (SamplingOptionsC { temperature: -1.0, ..sampling }, "temperature -1"),
        (SamplingOptionsC { temperature: f32::NAN, ..sampling }, "temperature NaN"),
        (SamplingOptionsC { top_p: 0.0, ..sampling }, "top_p 0"),
        (SamplingOptionsC { min_p: 1.0, ..sampling }, "min_p 1"),
        (SamplingOptionsC { repeat_penalty: 0.0, ..sampling }, "repeat_penalty 0"),
    ] {
        // SAFETY: as above.
        fails(unsafe { specache_session_set_sampling(alive, &options) }, Status::Usage, words);
    }
    assert_eq!(tokens(alive), [1, 2], "nothing has changed");
    free(alive);
    close(engine);
}

#[test]
fn budgets() {
    let options = EngineOptions { host_kv_budget: 4 << 20, device_budget: 64 << 20, ..engine_options() };
    let engine = engine(&fixture("recall"), &options);
    let kv = kv_options();
    let create = |max_tokens, session: &mut SessionPtr| {
        // SAFETY: structs of this function.
        unsafe { specache_session_create(engine, &kv, max_tokens, session) }
    };
    let mut small = ptr::null_mut();
    ok(create(600, &mut small));
    fails(create(3500, &mut ptr::null_mut()), Status::OutOfMemory, "raise host_kv_budget");
    let ids = tokenize(engine, &prompt_text());
    ok(prefill(small, &ids[..500]));
    fails(specache_session_reserve(small, 100_000), Status::OutOfMemory, "bytes are available");
    let expected = generate(small, 5, 1, None).1.ids;
    ok(specache_session_reset(small));
    ok(prefill(small, &ids[..500]));
    assert_eq!(generate(small, 5, 1, None).1.ids, expected);
    let memory = memory(engine);
    assert_eq!((memory.host_kv_budget, memory.device_budget), (4 << 20, 64 << 20));
    assert!(memory.host_pages_leased > 0 && memory.device_kv_bytes > 0);
    assert_eq!((memory.device_bytes, memory.device_weight_bytes), (memory.device_kv_bytes, 0), "weights are mapped");
    free(small);

    let options = EngineOptions { device_budget: 1 << 16, ..engine_options() };
    let tight = common::capi::engine(&fixture("recall"), &options);
    // SAFETY: as above.
    let status = unsafe { specache_session_create(tight, &kv, 1000, &mut ptr::null_mut()) };
    fails(status, Status::OutOfMemory, "raise device_budget");
    close(tight);
    close(engine);
}

/// A reset keeps the session's memory. Forks share pages, which must be replaced: what there are too few of for that is
/// refused, and then nothing has changed.
#[test]
fn resets_of_forks() {
    let options = EngineOptions { host_kv_budget: 6 << 20, ..engine_options() };
    let engine = engine(&fixture("recall"), &options);
    let ids = tokenize(engine, &prompt_text());
    let trunk = session(engine, &kv_options(), 900);
    ok(prefill(trunk, &ids[..850]));
    let forks: Vec<SessionPtr> = (0..8).map(|_| fork(trunk)).collect();
    let expected = generate(trunk, 5, 1, None).1.ids;
    let mut refused = Vec::new();
    for &fork in &forks {
        match specache_session_reset(fork) {
            0 => {
                assert!(tokens(fork).is_empty());
                ok(prefill(fork, &ids[..850]));
            }
            status => {
                fails(status, Status::OutOfMemory, "host_kv_budget");
                assert_eq!(tokens(fork), ids[..850], "nothing has changed");
                refused.push(fork);
            }
        }
        assert_eq!(generate(fork, 5, 1, None).1.ids, expected);
    }
    assert!(!refused.is_empty() && refused.len() < forks.len(), "{} of 8", refused.len());
    // With the others gone there are pages again.
    free(trunk);
    forks.iter().filter(|fork| !refused.contains(fork)).for_each(|&fork| free(fork));
    ok(specache_session_reset(refused[0]));
    ok(prefill(refused[0], &ids[..850]));
    assert_eq!(generate(refused[0], 5, 1, None).1.ids, expected);
    refused.into_iter().for_each(free);
    close(engine);
}

/// In every mode a session that was reset is as a new one: the same logits, bit for bit, and figures that begin anew.
#[test]
fn a_reset_session_is_a_new_one() {
    let engine = recall();
    let ids = tokenize(engine, &prompt_text());
    for mode in 0..5 {
        let kv = KvOptionsC { mode, bits: 1, top_k: 16, ..kv_options() };
        let life = |session| {
            ok(prefill(session, &ids[100..700]));
            let mut rows = vec![logits(session)];
            for &id in &ids[700..800] {
                ok(step(session, id));
                rows.push(logits(session));
            }
            (rows, format!("{:?}", SessionStats { exposed_ns: 0, ..stats(session) }))
        };
        let (new, used) = (session(engine, &kv, 1000), session(engine, &kv, 1000));
        let expected = life(new);
        ok(prefill(used, &ids[..900]));
        ok(generate(used, 90, 1, None).0);
        ok(specache_session_reset(used));
        assert!(life(used) == expected, "mode {mode}");
        free(new);
        free(used);
    }
    close(engine);
}

/// What a batch or a call of sample has chosen is the caller's: it comes into a session only if it is fed.
#[test]
fn choices_are_not_fed_unasked() {
    let engine = recall();
    let one = session(engine, &kv_options(), 64);
    ok(prefill(one, &[1, 2]));
    let chosen = sample(one);
    assert_eq!(generate(one, 1, 1, None).1.ids, [chosen], "from the same logits");
    ok(specache_session_truncate(one, 2));
    ok(prefill(one, &[3]));
    assert_eq!(tokens(one), [1, 2, 3], "a truncation has dropped the token that was generated");
    sample(one);
    ok(prefill(one, &[4]));
    assert_eq!(tokens(one), [1, 2, 3, 4]);
    let mut steps = [batched(one, 5)];
    ok(step_batch(&mut steps));
    assert_eq!(logits(one).len(), 1536, "they are known after a batch");
    assert_eq!(sample(one), steps[0].next);
    ok(prefill(one, &[6]));
    assert_eq!(tokens(one), [1, 2, 3, 4, 5, 6]);
    // What a generation has shown is a part of what goes on.
    let shown = generate(one, 2, 1, None).1.ids;
    ok(prefill(one, &[7]));
    assert_eq!(tokens(one), [&[1, 2, 3, 4, 5, 6], &shown[..], &[7]].concat());
    free(one);
    close(engine);
}

/// A conversation in three turns: the answers of the command line, each prompt prefilled as far as it is new.
#[test]
fn a_conversation() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi-conversation");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(fixture("recall").join(file), folder.join(file)).unwrap();
    }
    // An answer ends with a token of its own, and once as the template would not have it: in the middle of a word.
    let plain = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}. Recall kose{% else %}. {% endif %}{% endfor %}";
    let rewrites = "{{ messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}Recall kose";
    let messages =
        ["The password of kose zesi rere bago. The password of fimi maga losu", "And of fimi", "Recall fimi maga"];
    for (template, kept_all) in [(plain, true), (rewrites, false)] {
        std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
        for (mode, name) in ["full", "kivi", "offload", "fetch", "specache"].into_iter().enumerate() {
            let mut cli = common::command(&[]);
            cli.args(["chat", "--device", "cpu", "--temp", "0", "-n", "5", "--kv", name, "-m"]).arg(&folder);
            cli.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
            let mut child = cli.spawn().unwrap();
            std::io::Write::write_all(&mut child.stdin.take().unwrap(), messages.join("\n").as_bytes()).unwrap();
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success());

            let engine = common::capi::engine(&folder, &engine_options());
            let one = session(engine, &KvOptionsC { mode: mode as i32, ..kv_options() }, 64);
            let mut said: Vec<(&CStr, CString)> = Vec::new();
            let mut answers = String::new();
            for message in messages {
                said.push((c"user", CString::new(message).unwrap()));
                let held = tokens(one);
                let kept = prefill_chat(one, &said);
                assert!(kept == held.len() || (!kept_all && kept < held.len()), "{name}: {kept} of {}", held.len());
                assert_eq!(tokens(one)[..kept], held[..kept]);
                let (status, shown, _) = generate(one, 5, 0, None);
                ok(status);
                answers += &shown.text;
                answers.push('\n');
                said.push((c"assistant", CString::new(shown.text).unwrap()));
            }
            assert_eq!(answers, String::from_utf8(output.stdout).unwrap(), "{name}");
            // The last question once more: its answer is forgotten, and the same again.
            said.pop();
            let held = tokens(one).len();
            assert!(prefill_chat(one, &said) < held, "the last token is fed anew");
            let again = generate(one, 5, 0, None).1.text;
            assert!(answers.ends_with(&format!("\n{again}\n")) || mode == 1, "{name}: {again:?}");
            // Cancelled: as before.
            let held = tokens(one);
            ok(specache_session_cancel(one));
            // SAFETY: nothing is read.
            fails(unsafe { chat_status(one, &said) }, Status::Cancelled, "cancelled");
            assert_eq!(tokens(one), held);
            free(one);
            close(engine);
        }
    }
}

/// A conversation that has nothing in common with the one before begins anew, and the statistics go on.
#[test]
fn another_conversation() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi-another");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(fixture("recall").join(file), folder.join(file)).unwrap();
    }
    std::fs::write(folder.join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    let engine = common::capi::engine(&folder, &engine_options());
    let [first, second] = ["The password of kose zesi rere bago. Recall kose", "Recall fimi"];
    for mode in 0..5 {
        let one = session(engine, &KvOptionsC { mode, ..kv_options() }, 64);
        let text = |prompt: &str| {
            assert_eq!(prefill_chat(one, &[(c"user", CString::new(prompt).unwrap())]), 0);
            assert_eq!(tokens(one), tokenize(engine, prompt));
            let (status, shown, _) = generate(one, 4, 1, None);
            ok(status);
            (shown.text, stats(one).steps)
        };
        assert_eq!(text(first).1, 3);
        let offloaded = stats(one).offloaded_bytes;
        let (answer, steps) = text(second);
        assert_eq!(steps, 6, "mode {mode}");
        assert!(stats(one).offloaded_bytes >= offloaded);
        ok(specache_session_reset(one));
        assert_eq!((stats(one).steps, text(second)), (0, (answer, 3)));
        free(one);
    }
    close(engine);
}

/// An answer whose text the tokenizer would cut differently stays as it was written.
#[test]
fn a_conversation_keeps_the_tokens_of_an_answer() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi-cuts");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(fixture("recall").join(file), folder.join(file)).unwrap();
    }
    std::fs::write(folder.join("chat_template.jinja"), "{% for m in messages %}{{ m.content }}. {% endfor %}").unwrap();
    let engine = common::capi::engine(&folder, &engine_options());
    let one = session(engine, &kv_options(), 64);
    let mut said = vec![(c"user", c"Recall kose".to_owned())];
    assert_eq!(prefill_chat(one, &said), 0);
    let pieces: Vec<u32> = "zesi".chars().flat_map(|c| tokenize(engine, &c.to_string())).collect();
    assert_ne!(tokenize(engine, "zesi"), pieces);
    pieces.iter().for_each(|&id| ok(step(one, id)));
    // SAFETY: `list` passes room for as many as it says.
    let answer = list(0, |text: *mut c_char, capacity, n| unsafe {
        specache_detokenize(engine, pieces.as_ptr(), pieces.len(), text, capacity, n)
    });
    said.push((c"assistant", CString::new(answer.iter().map(|&b| b as u8).collect::<Vec<_>>()).unwrap()));
    said.push((c"user", c"Recall fimi".to_owned()));
    let held = tokens(one);
    assert_eq!(prefill_chat(one, &said), held.len(), "all of it stays");
    assert_eq!(tokens(one)[held.len()..], tokenize(engine, ". Recall fimi. "));
    // Changed afterwards, it does not.
    said[1].1 = c"another answer".to_owned();
    assert!(prefill_chat(one, &said) < held.len());
    free(one);
    close(engine);
}

fn c_messages(said: &[(&CStr, CString)]) -> Vec<ChatMessage> {
    said.iter().map(|(role, content)| ChatMessage { role: role.as_ptr(), content: content.as_ptr() }).collect()
}

/// How many tokens stayed.
fn prefill_chat(session: SessionPtr, said: &[(&CStr, CString)]) -> usize {
    let (messages, mut kept) = (c_messages(said), u64::MAX);
    // SAFETY: messages of this function.
    ok(unsafe { specache_session_prefill_chat(session, messages.as_ptr(), messages.len(), &mut kept) });
    kept as usize
}

/// What the call comes to.
unsafe fn chat_status(session: SessionPtr, said: &[(&CStr, CString)]) -> i32 {
    let messages = c_messages(said);
    // SAFETY: messages of this function.
    unsafe { specache_session_prefill_chat(session, messages.as_ptr(), messages.len(), ptr::null_mut()) }
}

/// The plan of a folder is what a session of it then takes.
#[test]
fn plans() {
    let engine = recall();
    let model = CString::new(fixture("recall").to_str().unwrap()).unwrap();
    for mode in 0..5 {
        let kv = KvOptionsC { mode, ..kv_options() };
        // SAFETY: zero is a value of every field.
        let mut plan: MemoryPlan = unsafe { std::mem::zeroed() };
        plan.struct_size = size_of::<MemoryPlan>() as u32;
        // SAFETY: structs of this function.
        ok(unsafe { specache_plan(1, model.as_ptr(), &kv, 1000, &mut plan) });
        let session = session(engine, &kv, 1000);
        let stats = stats(session);
        let device = plan.packed_bytes + plan.wide_bytes + plan.slot_bytes + plan.load_bytes;
        assert_eq!((plan.device_bytes, memory(engine).device_kv_bytes), (device, device), "mode {mode}");
        assert_eq!(
            (plan.packed_bytes, plan.wide_bytes, plan.slot_bytes, plan.load_bytes, plan.host_bytes),
            (stats.packed_bytes, stats.wide_bytes, stats.slot_bytes, stats.load_bytes, stats.host_bytes)
        );
        assert_eq!(plan.weight_bytes, memory(engine).weight_bytes);
        free(session);
    }
    close(engine);
}

/// From another thread, in a prefill and in a generation; before a call; in vain.
#[test]
fn cancel() {
    let engine = recall();
    let ids = tokenize(engine, &prompt_text());
    let one = session(engine, &kv_options(), 4000);
    let expected = {
        ok(prefill(one, &ids));
        generate(one, 20, 1, None).1.ids
    };
    ok(specache_session_reset(one));

    // Before a call: it heeds it, and the next one does not.
    ok(specache_session_cancel(one));
    fails(prefill(one, &ids), Status::Cancelled, "cancelled");
    ok(specache_session_cancel(one));
    ok(specache_session_clear_cancel(one));
    ok(prefill(one, &ids));
    ok(specache_session_cancel(one));
    let (status, shown, _) = generate(one, 20, 1, None);
    fails(status, Status::Cancelled, "cancelled");
    assert!(shown.ids.is_empty());
    ok(specache_session_cancel(one));
    fails(step(one, 5), Status::Cancelled, "cancelled");
    let mut steps = [one, fork(one)].map(|session| Step {
        session,
        logits: ptr::null_mut(),
        n_logits: 0,
        token: expected[0],
        next: 0,
        status: 0,
        reserved: 0,
    });
    ok(specache_session_cancel(one));
    // SAFETY: two steps.
    fails(unsafe { specache_step_batch(steps.as_mut_ptr(), 2, 40) }, Status::Cancelled, "step 0: cancelled");
    assert_eq!((steps[0].status, steps[1].status, steps[1].next), (Status::Cancelled as i32, 0, expected[1]));
    free(steps[1].session);

    // A reset forgets it.
    let other = fork(one);
    ok(specache_session_cancel(other));
    ok(specache_session_reset(other));
    ok(prefill(other, &ids[..50]));
    free(other);

    // While it runs, again and again: whatever it has come to, it goes on with the same tokens.
    let mut given = Vec::new();
    let handle = Handle(one);
    for i in 0..20 {
        let canceller = thread::spawn(move || {
            thread::sleep(Duration::from_micros(300 * i));
            ok(specache_session_cancel(handle.get()));
        });
        let (status, shown, _) = generate(one, 1, 1, None);
        canceller.join().unwrap();
        assert!(status == 0 || status == Status::Cancelled as i32, "{}", last_error());
        given.extend(shown.ids);
        ok(specache_session_clear_cancel(one));
    }
    given.extend(generate(one, 20 - given.len() as u64, 1, None).1.ids);
    assert_eq!(given, expected);

    // A prefill stops within a layer, and the session is as before.
    let long: Vec<u32> = ids.iter().copied().cycle().take(3000).collect();
    let before = tokens(one);
    let canceller = thread::spawn(move || {
        thread::sleep(Duration::from_millis(1));
        ok(specache_session_cancel(handle.get()));
        Instant::now()
    });
    fails(prefill(one, &long), Status::Cancelled, "cancelled");
    let took = canceller.join().unwrap().elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}: a chunk of a layer takes milliseconds");
    assert_eq!(tokens(one), before);
    free(one);
    close(engine);
}

/// What a callback has seen, and does.
struct Inside {
    session: SessionPtr,
    statuses: Vec<i32>,
    seen: usize,
}

/// # Safety
/// `user_data` is an [`Inside`].
unsafe extern "C" fn misbehave(user_data: *mut c_void, _: *const TokenC) -> i32 {
    // SAFETY: the caller's promise.
    let inside = unsafe { &mut *user_data.cast::<Inside>() };
    inside.seen += 1;
    if inside.seen == 1 {
        inside.statuses = vec![
            step(inside.session, 1),
            prefill(inside.session, &[1]),
            specache_session_reset(inside.session),
            generate(inside.session, 1, 0, None).0,
        ];
    }
    if inside.seen == 2 {
        free(inside.session);
        free(inside.session);
    }
    0
}

/// Calls with a session that is in a call, and its end in the middle of one.
#[test]
fn freed_while_it_works() {
    let engine = recall();
    let ids = tokenize(engine, &prompt_text());
    let one = session(engine, &kv_options(), 1100);
    ok(prefill(one, &ids));
    let mut inside = Inside { session: one, statuses: vec![], seen: 0 };
    let user_data = (&raw mut inside).cast();
    let mut n = 0;
    // SAFETY: values of this function.
    ok(unsafe { specache_session_generate(one, 9, 1, Some(misbehave), user_data, &mut n, ptr::null_mut()) });
    assert_eq!((n, inside.seen), (9, 9), "it has gone on to its end");
    assert_eq!(inside.statuses, [Status::Busy as i32; 4]);
    fails(step(one, 1), Status::Handle, "freed");

    // From another thread; engine and session are both gone before the work is.
    let (two, handle) = (session(engine, &kv_options(), 1100), Handle(engine));
    let work = Handle(two);
    let worker = thread::spawn(move || {
        let two = work.get();
        let ids: Vec<u32> = (0..900).collect();
        (prefill(two, &ids), generate(two, 100, 1, None))
    });
    thread::sleep(Duration::from_millis(30));
    specache_engine_free(handle.get());
    free(two);
    let (first, (second, shown, _)) = worker.join().unwrap();
    // The second call may have come too late to find its session.
    let gone = Status::Handle as i32;
    assert!(first == 0 || first == gone, "{first}");
    assert!((second == 0 && shown.ids.len() == 100) || second == gone, "{second}");
}

/// A batch with what cannot take part: the others go on.
#[test]
fn batches_with_faults() {
    let (engine, other) = (recall(), recall());
    let make = |engine, prompt: &[u32]| {
        let session = session(engine, &kv_options(), 70);
        if !prompt.is_empty() {
            ok(prefill(session, prompt));
        }
        session
    };
    let (good, empty, full) = (make(engine, &[1, 2]), make(engine, &[]), make(engine, &[1; 70]));
    let step =
        |session, token| Step { session, logits: ptr::null_mut(), n_logits: 0, token, next: 0, status: 0, reserved: 0 };
    let mut steps = [step(good, 3), step(empty, 3), step(full, 3), step(make(engine, &[1]), 9999), step(good, 3)];
    // SAFETY: as many steps as there are.
    let status = unsafe { specache_step_batch(steps.as_mut_ptr(), steps.len(), size_of::<Step>()) };
    fails(status, Status::Usage, "step 1: decode: the session is empty");
    let text = last_error();
    for words in ["step 2: decode: the session is full", "step 3: token 9999", "step 4: the session of step 0"] {
        assert!(text.contains(words), "{text}");
    }
    let statuses: Vec<i32> = steps.iter().map(|step| step.status).collect();
    assert_eq!(statuses, [0, 2, 2, 2, Status::Busy as i32]);
    assert_eq!(tokens(good), [1, 2, 3]);

    let foreign = make(other, &[1]);
    let mut mixed = [step(good, 3), step(foreign, 3)];
    // SAFETY: as above.
    fails(unsafe { specache_step_batch(mixed.as_mut_ptr(), 2, size_of::<Step>()) }, Status::Usage, "two engines");
    assert_eq!((tokens(good).len(), tokens(foreign).len()), (3, 1), "nobody has gone on");
    assert_eq!(mixed.map(|step| (step.status, step.next)), [(Status::Usage as i32, u32::MAX); 2], "refused as a whole");
    steps.iter().map(|step| step.session).chain([foreign]).for_each(free);
    close(engine);
    close(other);
}

/// # Safety
/// `user_data` is a `Mutex<Vec<(i32, String)>>`.
unsafe extern "C" fn keep(user_data: *mut c_void, level: i32, message: *const c_char) {
    // SAFETY: the caller's promise, and the library's.
    let (log, text) = unsafe { (&*user_data.cast::<Mutex<Vec<(i32, String)>>>(), CStr::from_ptr(message)) };
    log.lock().unwrap().push((level, text.to_str().unwrap().to_string()));
}

#[test]
fn log_and_trace() {
    let log = Mutex::new(Vec::<(i32, String)>::new());
    for (log_level, levels) in [(4, vec![3, 2, 4]), (3, vec![3, 2]), (0, vec![])] {
        log.lock().unwrap().clear();
        let log_user_data = (&raw const log).cast_mut().cast();
        let options = EngineOptions { log: Some(keep), log_user_data, log_level, trace: 1, ..engine_options() };
        let engine = engine(&fixture("recall"), &options);
        let one = session(engine, &kv_options(), 5000); // more than the model was trained for
        let given: Vec<i32> = log.lock().unwrap().iter().map(|(level, _)| *level).collect();
        assert_eq!(given, levels);

        let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi-trace.json");
        let c_path = CString::new(path.to_str().unwrap()).unwrap();
        let events = || {
            // SAFETY: a C string.
            ok(unsafe { specache_engine_trace_write(engine, c_path.as_ptr()) });
            let json: serde_json::Value = common::json(&path);
            json["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "X").count()
        };
        ok(prefill(one, &[1, 2, 3]));
        assert_eq!(events(), 0, "off until it is switched on");
        ok(specache_engine_trace(engine, 1));
        ok(step(one, 4));
        assert!(events() > 20);
        ok(step(one, 4));
        ok(specache_engine_trace(engine, 0));
        ok(step(one, 4));
        let one_step = events();
        assert!((20..200).contains(&one_step), "{one_step}");
        // SAFETY: as above.
        let status = unsafe { specache_engine_trace_write(engine, c"/no/such/folder/x".as_ptr()) };
        fails(status, Status::Failed, "/no/such/folder/x");
        // What cannot be written is not lost, and what was there stays.
        ok(specache_engine_trace(engine, 1));
        ok(step(one, 4));
        ok(specache_engine_trace(engine, 0));
        let folder = path.with_extension("folder");
        std::fs::create_dir_all(&folder).unwrap();
        let c_folder = CString::new(folder.to_str().unwrap()).unwrap();
        // SAFETY: as above.
        fails(unsafe { specache_engine_trace_write(engine, c_folder.as_ptr()) }, Status::Failed, "folder");
        let full = CString::new("/dev/full").unwrap();
        // SAFETY: as above.
        fails(unsafe { specache_engine_trace_write(engine, full.as_ptr()) }, Status::Failed, "/dev/full");
        assert!((20..200).contains(&events()));
        let beside = std::fs::read_dir(path.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(!beside.into_iter().any(|name| name.to_str().unwrap().ends_with(".partial")));
        free(one);
        close(engine);
    }
    assert!(log.lock().unwrap().is_empty());
    let engine = recall();
    fails(specache_engine_trace(engine, 1), Status::Usage, "set `trace`");
    close(engine);
}

/// Traces that several threads write to one file at once do not disturb each other.
#[test]
fn traces_of_one_name() {
    let engine = engine(&fixture("recall"), &EngineOptions { trace: 1, ..engine_options() });
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi-one-name").join("trace.json");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let (c_path, handle) = (CString::new(path.to_str().unwrap()).unwrap(), Handle(engine));
    thread::scope(|scope| {
        for _ in 0..4 {
            // SAFETY: a C string.
            let write =
                || (0..100).for_each(|_| ok(unsafe { specache_engine_trace_write(handle.get(), c_path.as_ptr()) }));
            scope.spawn(write);
        }
    });
    let json: serde_json::Value = common::json(&path);
    assert!(json["traceEvents"].is_array());
    let beside = std::fs::read_dir(path.parent().unwrap()).unwrap().count();
    assert_eq!(beside, 1, "only the trace is there");
    close(engine);
}

#[test]
fn what_an_engine_is() {
    let engine = recall();
    // SAFETY: zero is a value of every field.
    let mut info: ModelInfo = unsafe { std::mem::zeroed() };
    info.struct_size = size_of::<ModelInfo>() as u32;
    // SAFETY: a struct of this function.
    ok(unsafe { specache_engine_model_info(engine, &mut info) });
    let ModelInfo { vocab_size, n_layers, n_heads, n_kv_heads, head_dim, hidden_size, .. } = info;
    assert_eq!((vocab_size, n_layers, n_heads, n_kv_heads, head_dim, hidden_size), (1536, 4, 4, 2, 64, 256));
    assert_eq!((info.has_tokenizer, info.has_chat_template, info.n_eos, info.max_positions), (1, 0, 1, 4096));
    // SAFETY: `list` passes room for as many as it says.
    let text = list(0, |text: *mut c_char, capacity, n| unsafe { specache_engine_describe(engine, text, capacity, n) });
    let text: String = text.iter().map(|&b| b as u8 as char).collect();
    assert!(text.starts_with("recall: 4 layers") && text.contains("CPU"), "{text}");
    let names: Vec<String> = (-1..13)
        // SAFETY: C strings that are never freed.
        .map(|status| unsafe { CStr::from_ptr(specache_status_name(status)) }.to_str().unwrap().to_string())
        .collect();
    assert_eq!(
        (names[0].as_str(), names[5].as_str(), names[13].as_str()),
        ("unknown status", "out of memory", "unknown status")
    );
    // SAFETY: as above.
    assert!(unsafe { CStr::from_ptr(specache_version()) }.to_str().unwrap().starts_with(env!("CARGO_PKG_VERSION")));

    let one = session(engine, &kv_options(), 1100);
    ok(prefill(one, &tokenize(engine, &prompt_text())));
    ok(generate(one, 20, 1, None).0);
    // SAFETY: as above.
    let layers = list(capi::LayerStats::default(), |layers, capacity, n| unsafe {
        specache_session_layer_stats(one, layers, capacity, n)
    });
    let stats = stats(one);
    assert_eq!((layers.len(), stats.n_layers), (4, 4));
    let (hits, of) = layers.iter().fold((0, 0), |sum, l| (sum.0 + l.hits, sum.1 + l.hits_of));
    assert!((stats.hit_rate - hits as f64 / of as f64).abs() < 1e-12 && stats.hit_rate > 0.2, "{stats:?}");
    let fetched: u64 = layers.iter().map(|l| l.fetched).sum();
    assert_eq!(fetched * 2 * 64 * 2, stats.fetched_bytes, "K and V of 64 numbers of 2 bytes");
    assert!(layers.iter().all(|l| l.selected >= l.fetched));
    free(one);
    close(engine);
}

/// The least stack that the header asks for is enough for all that a thread may do.
#[test]
fn on_a_small_stack() {
    let work = || {
        let engine = recall();
        let one = session(engine, &kv_options(), 1100);
        ok(prefill(one, &tokenize(engine, &prompt_text())));
        let (status, shown, _) = generate(one, 70, 1, None);
        ok(status);
        ok(step_batch(&mut [batched(one, shown.ids[69])]));
        free(fork(one));
        fails(specache_session_truncate(one, 0), Status::Usage, "from 1");
        ok(specache_session_reset(one));
        free(one);
        close(engine);
    };
    thread::Builder::new().stack_size(256 << 10).spawn(work).unwrap().join().unwrap();
}

/// Threads that the system refuses are no usage error. In a process of its own, whose address space ends soon.
#[test]
fn threads_that_cannot_be_started() {
    use nix::sys::resource::{Resource, setrlimit};
    const CHILD: &str = "SPECACHE_TEST_FEW_THREADS";
    if std::env::var_os(CHILD).is_none() {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["threads_that_cannot_be_started", "--exact", "--nocapture"]).env(CHILD, "1");
        let output = child.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    // Each thread has 2 MiB of stack.
    setrlimit(Resource::RLIMIT_AS, 1 << 30, 1 << 30).unwrap();
    let options = EngineOptions { threads: 1000, ..engine_options() };
    let mut engine = ptr::null_mut();
    // SAFETY: a C string and structs of this function.
    let status = unsafe { specache_engine_create(1, c"synthetic:tiny".as_ptr(), &options, &mut engine) };
    fails(status, Status::Device, "1000 compute threads cannot be started");
}

/// `org/name` is a model of the Hugging Face cache. In processes of their own, as `HF_HOME` says where that is.
#[test]
fn a_model_of_the_hugging_face_cache() {
    const CHILD: &str = "SPECACHE_TEST_HUB";
    let home = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi-hub");
    if std::env::var_os(CHILD).is_none() {
        let _ = std::fs::remove_dir_all(&home);
        common::hub_cache(&home.join("hub"), "facts/recall-1", &["0123abcd", "4567ef00"], Some("4567ef00"));
        let template = home.join("hub/models--facts--recall-1/snapshots/4567ef00/chat_template.jinja");
        std::fs::write(template, "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
            child.env_remove(name);
        }
        child
            .args(["a_model_of_the_hugging_face_cache", "--exact", "--nocapture"])
            .env(CHILD, "1")
            .env("HF_HOME", &home);
        let output = child.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        assert!(said.contains("1 passed"), "{said}");
        return;
    }
    let (by_name, by_folder) = (engine("facts/recall-1".as_ref(), &engine_options()), recall());
    let ids = tokenize(by_folder, &prompt_text());
    assert_eq!(tokenize(by_name, &prompt_text()), ids, "its tokenizer");
    let shown = [by_name, by_folder].map(|engine| {
        let one = session(engine, &kv_options(), 1100);
        ok(prefill(one, &ids));
        let (status, shown, _) = generate(one, 4, 1, None);
        ok(status);
        free(one);
        shown.text
    });
    assert_eq!(shown, [" fimi maga losu.", " fimi maga losu."]);
    let one = session(by_name, &kv_options(), 64);
    assert_eq!(prefill_chat(one, &[(c"user", c"Recall kose".to_owned())]), 0, "its chat template");
    free(one);
    // The name is the model's, not the revision's.
    // SAFETY: `list` passes room for as many as it says.
    let name =
        list(0, |text: *mut c_char, capacity, n| unsafe { specache_engine_describe(by_name, text, capacity, n) });
    assert!(name.iter().map(|&b| b as u8 as char).collect::<String>().starts_with("facts/recall-1: 4 layers"));
    close(by_name);
    close(by_folder);

    let mut none = ptr::null_mut();
    // SAFETY: a C string and structs of this function.
    let status = unsafe { specache_engine_create(1, c"facts/none".as_ptr(), &engine_options(), &mut none) };
    fails(status, Status::Model, "hf download facts/none");
    assert!(last_error().contains(home.join("hub/models--facts--none").to_str().unwrap()), "{}", last_error());
    assert!(none.is_null());
    // SAFETY: zero is a value of every field.
    let mut plan: MemoryPlan = unsafe { std::mem::zeroed() };
    plan.struct_size = size_of::<MemoryPlan>() as u32;
    // SAFETY: a C string and structs of this function.
    ok(unsafe { specache_plan(1, c"facts/recall-1".as_ptr(), &kv_options(), 1000, &mut plan) });
    assert!(plan.weight_bytes > 0, "{plan:?}");
}
