//! The C interface on a GPU, as far as the emulated CUDA driver shows it: the calls that a GPU answers in its own way.
#![allow(unsafe_code)] // Calls of C functions.

mod common;

use std::ffi::{CStr, c_char, c_void};
use std::sync::Mutex;

use common::capi::*;
use common::emulated::on_gpu;
use common::fixture;

/// Tokens of the recall model's prompt that are used: an emulated GPU is slow.
const PROMPT: usize = 150;

fn ids(engine: EnginePtr) -> Vec<u32> {
    let text = std::fs::read_to_string(fixture("recall_prompt.txt")).unwrap();
    tokenize(engine, &text)[..PROMPT].to_vec()
}

fn cuda() -> EngineOptions {
    EngineOptions { device: c"cuda".as_ptr(), threads: 1, ..engine_options() }
}

/// A session with the prompt in it.
fn prefilled(engine: EnginePtr, prompt: &[u32]) -> SessionPtr {
    let kv = KvOptionsC { bits: 2, top_k: 16, residual_len: 32, ..kv_options() };
    let one = session(engine, &kv, 200);
    ok(prefill(one, prompt));
    one
}

/// # Safety
/// `user_data` is a `Mutex<Vec<(i32, String)>>`.
unsafe extern "C" fn keep(user_data: *mut c_void, level: i32, message: *const c_char) {
    // SAFETY: the caller's promise, and the library's.
    let (log, text) = unsafe { (&*user_data.cast::<Mutex<Vec<(i32, String)>>>(), CStr::from_ptr(message)) };
    log.lock().unwrap().push((level, text.to_str().unwrap().to_string()));
}

#[test]
fn sessions_on_a_gpu() {
    on_gpu("sessions_on_a_gpu", &[], || {
        let log = Mutex::new(Vec::<(i32, String)>::new());
        let log_user_data = (&raw const log).cast_mut().cast();
        let options = EngineOptions {
            log: Some(keep),
            log_user_data,
            log_level: 4,
            linear: 1,
            device_budget: 64 << 20,
            ..cuda()
        };
        let (cpu, gpu) = (recall(), engine(&fixture("recall"), &options));
        let prompt = ids(cpu);

        // What an engine has before it has a session.
        let before = memory(gpu);
        assert_eq!((before.device_bytes, before.device_kv_bytes), (before.device_weight_bytes, 0), "{before:?}");
        assert!(before.device_weight_bytes >= before.weight_bytes && before.device_budget == 64 << 20, "{before:?}");

        // The CPU's tokens.
        let expected = {
            let one = prefilled(cpu, &prompt);
            generate(one, 6, 1, None).1
        };
        let one = prefilled(gpu, &prompt);
        let forks = [(); 2].map(|()| {
            let mut fork = std::ptr::null_mut();
            // SAFETY: a pointer of this function.
            ok(unsafe { specache_session_fork(one, &mut fork) });
            fork
        });
        let (status, shown, _) = generate(one, 6, 1, None);
        ok(status);
        assert_eq!((&shown.ids, &shown.text), (&expected.ids, &expected.text));
        let now = memory(gpu);
        let kinds = now.device_weight_bytes + now.device_kv_bytes + now.device_workspace_bytes;
        assert_eq!((kinds, now.device_weight_bytes), (now.device_bytes, before.device_weight_bytes));
        assert!(now.device_kv_bytes > 0 && now.device_workspace_bytes > 0, "{now:?}");

        // A batch gives a sequence the bits of a lone step, whatever is beside it.
        let vocab = logits(one).len();
        let mut rows = vec![vec![0.0f32; vocab]; 2];
        let mut steps = forks.map(|fork| batched(fork, expected.ids[0]));
        steps[1].token = expected.ids[1];
        for (step, row) in steps.iter_mut().zip(&mut rows) {
            (step.logits, step.n_logits) = (row.as_mut_ptr(), vocab as u64);
        }
        ok(step_batch(&mut steps));
        assert_eq!(steps[0].next, expected.ids[1]);
        let lone = prefilled(gpu, &prompt);
        ok(step(lone, expected.ids[0]));
        assert!(logits(lone) == rows[0] && logits(forks[0]) == rows[0]);
        // What nobody has asked for comes from the GPU when somebody does, also behind steps of others.
        let mut steps = forks.map(|fork| batched(fork, 7));
        ok(step_batch(&mut steps));
        ok(step(lone, 7));
        assert!(logits(lone) == logits(forks[0]) && logits(forks[0]) != rows[0]);
        assert_eq!([steps[0].next, steps[1].next], [sample(lone), sample(forks[1])]);

        // How long steps wait is measured where that is asked for.
        assert_eq!((stats(one).exposed_steps, stats(one).exposed_ns), (0, 0));
        ok(specache_engine_measure_waits(gpu, 1));
        let (status, more, _) = generate(one, 3, 1, None);
        ok(status);
        assert_eq!(stats(one).exposed_steps, 3);
        ok(specache_engine_measure_waits(gpu, 0));
        assert_eq!(more.ids.len(), 3);

        // Cancelled and reset; freed while others go on.
        ok(specache_session_cancel(one));
        fails(step(one, 1), Status::Cancelled, "cancelled");
        ok(specache_session_reset(one));
        ok(prefill(one, &prompt));
        assert_eq!(generate(one, 6, 1, None).1.ids, expected.ids);
        [one, lone, forks[0], forks[1]].into_iter().for_each(|session| specache_session_free(session));
        let after = memory(gpu);
        assert_eq!((after.device_kv_bytes, after.host_pages_leased, after.host_pages_reserved), (0, 0, 0));
        specache_engine_free(gpu);
        specache_engine_free(cpu);
        let log = log.lock().unwrap();
        // Behind what is said of kernels that are compiled first.
        assert!(log.iter().any(|(level, text)| *level == 3 && text.starts_with("recall: 4 layers")), "{log:?}");
    });
}

/// Who gathers is an option, and makes no difference to any bit; what has been found to be faster is said to the log.
#[test]
fn who_gathers() {
    on_gpu("who_gathers", &[], || {
        let log = Mutex::new(Vec::<(i32, String)>::new());
        let log_user_data = (&raw const log).cast_mut().cast();
        let ways = [(1, 0), (2, 2), (3, 0)].map(|(gather, gather_threads)| {
            let gpu = EngineOptions { gather, gather_threads, log: Some(keep), log_user_data, ..cuda() };
            let gpu = engine(&fixture("recall"), &gpu);
            let one = prefilled(gpu, &ids(gpu));
            let (status, shown, _) = generate(one, 20, 1, None);
            ok(status);
            let row = logits(one);
            specache_session_free(one);
            specache_engine_free(gpu);
            (shown.ids, row)
        });
        assert!(ways[0] == ways[1] && ways[0] == ways[2]);
        let log = log.into_inner().unwrap();
        let said = |words| log.iter().filter(|(level, text)| *level == 3 && text.starts_with(words)).count();
        assert_eq!(said("gather auto takes "), 1, "{log:?}");
    });
}

#[test]
fn budgets_of_a_gpu() {
    on_gpu("budgets_of_a_gpu", &[], || {
        let create = |options: &EngineOptions, model: &CStr| {
            let mut engine = std::ptr::null_mut();
            // SAFETY: a C string and structs of this function.
            unsafe { specache_engine_create(SPECACHE_ABI_VERSION, model.as_ptr(), options, &mut engine) }
        };
        // Weights count.
        let tiny = EngineOptions { device_budget: 100 << 10, ..cuda() };
        let recall = std::ffi::CString::new(fixture("recall").to_str().unwrap()).unwrap();
        fails(create(&tiny, &recall), Status::OutOfMemory, "raise device_budget");
        assert!(last_error().contains("the weights"), "{}", last_error());
        let other = EngineOptions { device: c"cuda:9".as_ptr(), ..cuda() };
        fails(create(&other, &recall), Status::Usage, "there is one GPU, cuda:0");

        // Without one of ours the GPU's own memory is the limit.
        let free = engine(&fixture("recall"), &cuda());
        let all = memory(free);
        assert!(all.device_budget < u64::MAX && all.device_budget > all.device_bytes, "{all:?}");
        // SAFETY: structs of this function.
        let status = unsafe {
            let full = KvOptionsC { mode: 0, ..kv_options() };
            specache_session_create(free, &full, all.device_budget / 1024, &mut std::ptr::null_mut())
        };
        fails(status, Status::OutOfMemory, "bytes are available");
        specache_engine_free(free);
    });
}

/// A GPU that is lost: all calls with a session say what the one did that met it, and what there was can be freed.
#[test]
fn a_session_of_a_lost_gpu() {
    on_gpu("a_session_of_a_lost_gpu", &[("SPECACHE_EMU_FAIL", "specache_attn_combine:1:719")], || {
        let gpu = engine(&fixture("recall"), &cuda());
        let one = prefilled(gpu, &ids(gpu));
        let held = tokens(one);
        fails(step(one, 1), Status::Device, "CUDA_ERROR");
        let why = last_error();
        let calls: [&dyn Fn() -> i32; 5] = [
            &|| step(one, 1),
            &|| prefill(one, &[1]),
            &|| generate(one, 2, 1, None).0,
            &|| specache_session_truncate(one, 1),
            &|| specache_session_reserve(one, 400),
        ];
        for call in calls {
            fails(call(), Status::Device, "");
            assert_eq!(last_error(), why);
        }
        assert_eq!((stats(one).n_tokens as usize, tokens(one)), (held.len(), held));
        // A new one would need the GPU.
        fails(specache_session_reset(one), Status::Device, "CUDA_ERROR");
        fails(step(one, 1), Status::Usage, "without memory");
        specache_session_free(one);
        specache_engine_free(gpu);
    });
}

/// What the library has to say beside a call's result goes to the log.
#[test]
fn words_of_the_library() {
    let cache = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi-no-kernels");
    let _ = std::fs::remove_dir_all(&cache);
    on_gpu("words_of_the_library", &[("XDG_CACHE_HOME", cache.to_str().unwrap())], || {
        // An engine that is not made says what it did until then, too, and leaves nothing for the next.
        let first = said_without_engine(&cuda());
        let second = said(&cuda());
        assert_eq!(second.len(), 1, "kernels are kept, and what was said is said: {second:?}");
        if first.is_empty() {
            return println!("skipped: this program was built with nvcc");
        }
        assert!(first.iter().any(|(level, text)| *level == 3 && text.contains(" kernel files for ")), "{first:?}");
    });
}

/// What the log says of an engine of the recall model.
fn said(options: &EngineOptions) -> Vec<(i32, String)> {
    let log = Mutex::new(Vec::<(i32, String)>::new());
    let options = EngineOptions { log: Some(keep), log_user_data: (&raw const log).cast_mut().cast(), ..*options };
    specache_engine_free(engine(&fixture("recall"), &options));
    log.into_inner().unwrap()
}

/// The same of one that cannot be made.
fn said_without_engine(options: &EngineOptions) -> Vec<(i32, String)> {
    let log = Mutex::new(Vec::<(i32, String)>::new());
    let options = EngineOptions { log: Some(keep), log_user_data: (&raw const log).cast_mut().cast(), ..*options };
    let mut engine = std::ptr::null_mut();
    // SAFETY: a C string and structs of this function.
    let status =
        unsafe { specache_engine_create(SPECACHE_ABI_VERSION, c"/no/such/folder".as_ptr(), &options, &mut engine) };
    fails(status, Status::Model, "no such folder");
    log.into_inner().unwrap()
}

/// Why it is the CPU that computes, where a GPU would have been taken: said as soon as it is known.
#[test]
fn without_a_gpu_the_log_says_why() {
    let auto = EngineOptions { device: c"auto".as_ptr(), ..engine_options() };
    let log = said(&auto);
    let (_, last) = log.last().unwrap();
    assert!(last.starts_with("recall: 4 layers"), "{log:?}");
    let early = said_without_engine(&auto);
    if last.contains("CPU") {
        assert!(log[0].0 == 3 && log[0].1.starts_with("the CPU computes: "), "{log:?}");
        assert_eq!(early, [log[0].clone()]);
    }
    assert_eq!(said(&engine_options()).len(), 1, "it was asked for");
    assert!(said_without_engine(&EngineOptions { log_level: 0, ..auto }).is_empty());
}
