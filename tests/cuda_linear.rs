//! The two ways in which a GPU computes the dense part of a layer, `--linear fused` and `cublas`, on the emulated driver:
//! their logits against the CPU device's, which of them runs when, and what happens when cuBLASLt is missing or fails.
//!
//! Needs `tools/emulated_driver.sh`. Without it the tests say so and pass; SPECACHE_REQUIRE_EMULATION=1 makes that a
//! failure.
#![allow(unsafe_code)] // The emulated driver's report.

mod common;

use std::ffi::c_char;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::tiny::{Random, Tiny, ids};
use common::{Distance, device, fixture, json, kv, options, run};
use specache::device::fault::{Fault, Faults};
use specache::device::map::Bytes;
use specache::device::{Device, DeviceOptions, LinearPath};
use specache::kv::KvMode;
use specache::model::{Dtype, Linear, Matrix, Model};
use specache::{Buffers, Engine, Error, KvOptions, Next, Prompt, Session};

/// The folder with the emulated libraries.
fn emulation() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/emulated");
    if folder.join("libspecache_emu.so").is_file() {
        return Some(folder);
    }
    let asked = std::env::var_os("SPECACHE_REQUIRE_EMULATION").is_some_and(|v| v == "1");
    assert!(!asked, "no emulated driver in {}: run tools/emulated_driver.sh", folder.display());
    eprintln!("not tested: no emulated driver (tools/emulated_driver.sh)");
    None
}

fn with_libraries<'a>(command: &'a mut Command, folder: &Path) -> &'a mut Command {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda_linear_cache");
    command.env("LD_LIBRARY_PATH", folder).env("XDG_CACHE_HOME", cache).env_remove("SPECACHE_LINEAR")
}

/// Runs `body` in a process of its own that finds the emulated libraries, and expects no error in the driver's report.
fn on_emulation(test: &str, env: &[(&str, &str)], body: impl FnOnce()) {
    const INNER: &str = "SPECACHE_TEST_ON_EMULATION";
    if std::env::var_os(INNER).is_some() {
        body();
        let (errors, report) = report();
        assert_eq!(errors, 0, "{report}");
        return;
    }
    let Some(folder) = emulation() else { return };
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture"]).env(INNER, "1").envs(env.iter().copied());
    let output = with_libraries(&mut command, &folder).output().unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{out}\n{err}");
    eprint!("{err}");
}

/// Errors that the emulated driver has seen, and what it says of them.
fn report() -> (i32, String) {
    let mut text = vec![0u8; 1 << 16];
    // SAFETY: the emulated driver is open already; the function writes a string of at most so many bytes.
    let errors = unsafe {
        let library = libloading::Library::new("libcuda.so.1").unwrap();
        let report = library
            .get::<unsafe extern "C" fn(*mut c_char, usize) -> i32>("specache_emu_report")
            .expect("the emulated driver");
        report(text.as_mut_ptr().cast(), text.len())
    };
    let end = text.iter().position(|&byte| byte == 0).unwrap();
    (errors, String::from_utf8_lossy(&text[..end]).into_owned())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn on_gpu(model: Model, linear: LinearPath) -> Result<Engine, Error> {
    Engine::new(model, Device::cuda(0, &DeviceOptions { linear, ..options(2) })?)
}

fn on_cpu(model: Model) -> Engine {
    Engine::new(model, device(2)).unwrap()
}

/// The same numbers in another type.
fn rounded(from: &Matrix, dtype: Dtype) -> Matrix {
    let mut values = vec![0.0; from.rows() * from.cols()];
    values.chunks_exact_mut(from.cols()).enumerate().for_each(|(r, to)| from.row_f32(r, to));
    let round = |x: f32| match dtype {
        Dtype::Bf16 => half::bf16::from_f32(x).to_le_bytes(),
        Dtype::F16 => half::f16::from_f32(x).to_le_bytes(),
        Dtype::F32 => unreachable!(),
    };
    let bytes: Vec<u8> = values.into_iter().flat_map(round).collect();
    Matrix::new(Bytes::filled(bytes.len(), |to| to.copy_from_slice(&bytes)).unwrap(), dtype, from.rows(), from.cols())
}

const SHAPE: Tiny = Tiny { head_dim: 64, n_kv_heads: 2, group_heads: 2, n_layers: 3, window: None };

/// A model of 16-bit weights: those of attention and of the MLP, in types of their own.
fn narrow(shape: Tiny, attention: Dtype, mlp: Dtype) -> Model {
    let mut model = shape.model();
    for layer in &mut model.weights.layers {
        for linear in [&mut layer.q, &mut layer.k, &mut layer.v, &mut layer.o] {
            linear.weight = rounded(&linear.weight, attention);
        }
        for linear in [&mut layer.gate, &mut layer.up, &mut layer.down] {
            linear.weight = rounded(&linear.weight, mlp);
        }
    }
    model.weights.embed = rounded(&model.weights.embed, attention);
    model.weights.lm_head.weight = rounded(&model.weights.lm_head.weight, attention);
    model
}

fn with_biases(mut model: Model) -> Model {
    let mut random = Random(3);
    let mut bias = |linear: &mut Linear| {
        linear.bias = Some((0..linear.weight.rows()).map(|_| random.next() * 0.5).collect());
    };
    for layer in &mut model.weights.layers {
        let linears = [&mut layer.q, &mut layer.k, &mut layer.v, &mut layer.o];
        linears.into_iter().chain([&mut layer.gate, &mut layer.up, &mut layer.down]).for_each(&mut bias);
    }
    model
}

/// As Qwen3 has them, and one matrix for both ends.
fn with_norms_and_one_head(mut model: Model) -> Model {
    let mut random = Random(4);
    let head_dim = model.config.head_dim;
    for layer in &mut model.weights.layers {
        for norm in [&mut layer.q_norm, &mut layer.k_norm] {
            *norm = Some((0..head_dim).map(|_| 1.0 + random.next() * 0.5).collect());
        }
    }
    model.weights.lm_head.weight = model.weights.embed.clone();
    model
}

/// Both paths against the CPU device, over a prefill of more than 64 rows and decode steps. What differs, by the largest
/// difference of a row's logits, which are about 3 in size:
///
/// - attention rounds q and p of a prefill to the cache's type (csrc/README.md), here bf16: 6e-4 of values around 1;
/// - a K or V between two bf16 numbers is rounded by the order of a sum, on either path: 2^-8 of one number;
/// - cuBLASLt's operands are rounded to the weights' type: 2^-9 of each number with bf16, and a layer has four of them.
///
/// A missing bias, norm or rotation, or a row beside its place, gives differences of the size of the logits.
#[test]
fn both_paths_give_the_cpu_devices_logits() {
    on_emulation("both_paths_give_the_cpu_devices_logits", &[], || {
        use Dtype::{Bf16, F16};
        type Case = (&'static str, fn() -> Model);
        let cases: [Case; 6] = [
            ("bf16", || narrow(SHAPE, Bf16, Bf16)),
            ("fp16, biases", || with_biases(narrow(SHAPE, F16, F16))),
            ("bf16, biases", || with_biases(narrow(SHAPE, Bf16, Bf16))),
            ("norms of heads, one head", || with_norms_and_one_head(narrow(SHAPE, Bf16, Bf16))),
            ("fp16 MLP, fp32 LM head", || {
                let mut model = with_biases(narrow(SHAPE, Bf16, F16));
                model.weights.lm_head = SHAPE.model().weights.lm_head;
                model
            }),
            ("head_dim 128, a window", || {
                narrow(Tiny { head_dim: 128, n_kv_heads: 1, group_heads: 3, n_layers: 2, window: Some(40) }, Bf16, F16)
            }),
        ];
        let ids = ids(11, 90);
        for (name, model) in cases {
            let (theirs, _) = run(&on_cpu(model()), kv(KvMode::Full, 2, 64, 64, 0), &ids, 84, None);
            for (linear, most, median) in [(LinearPath::Fused, 0.03, 0.02), (LinearPath::Cublas, 0.1, 0.06)] {
                let engine = on_gpu(model(), linear).unwrap();
                let (ours, _) = run(&engine, kv(KvMode::Full, 2, 64, 64, 0), &ids, 84, None);
                let distance = Distance::between(&ours, &theirs);
                eprintln!("{name}, {linear:?}: {distance:?}");
                assert!(distance.max < most && distance.median < median, "{name}, {linear:?}: {distance:?}");
            }
        }
    });
}

/// The recall model, bf16: a prompt of 992 tokens by cuBLASLt, whose operands are rounded once, and by the fused kernels
/// for the first 100 of them, which the emulation computes slowly; the method's own mode and the plain one.
#[test]
fn the_recall_model_gives_the_cpu_devices_logits() {
    on_emulation("the_recall_model_gives_the_cpu_devices_logits", &[], || {
        let load = || Model::load(fixture("recall").to_str().unwrap()).unwrap();
        let prompts: Vec<serde_json::Value> = json(fixture("recall_prompts.json"));
        let ids: Vec<u32> = serde_json::from_value(prompts[0]["ids"].clone()).unwrap();
        let cpu = on_cpu(load());
        for (linear, n, kld) in [(LinearPath::Cublas, ids.len(), 1e-4), (LinearPath::Fused, 100, 1e-5)] {
            let gpu = on_gpu(load(), linear).unwrap();
            for options in [kv(KvMode::Full, 2, 64, 64, 0), kv(KvMode::SpeCache, 2, 64, 64, 64)] {
                let prefill = n - 5;
                let (theirs, _) = run(&cpu, options, &ids[..n], prefill, None);
                let (ours, _) = run(&gpu, options, &ids[..n], prefill, None);
                let distance = Distance::between(&ours, &theirs);
                eprintln!("{linear:?}, {}: {distance:?}", options.mode.name());
                assert!(distance.mean_kld < kld, "{linear:?}, {}: {distance:?}", options.mode.name());
            }
        }
    });
}

/// More than eight sequences, so that `auto` takes cuBLASLt for all rows of the batch at once: of two modes and with
/// caches of two number types, as groups of their own. Each against the CPU device alone, as above.
#[test]
fn a_large_batch_gives_what_each_sequence_gives_alone() {
    on_emulation("a_large_batch_gives_what_each_sequence_gives_alone", &[], || {
        let model = || with_biases(narrow(SHAPE, Dtype::Bf16, Dtype::Bf16));
        let (cpu, gpu) = (on_cpu(model()), on_gpu(model(), LinearPath::Auto).unwrap());
        let of = |i: usize| match i {
            0..5 => kv(KvMode::SpeCache, 4, 64, 64, 32),
            5..8 => kv(KvMode::Full, 2, 64, 64, 0),
            _ => KvOptions { dtype: Some(Dtype::F16), ..kv(KvMode::SpeCache, 4, 64, 64, 32) },
        };
        const STEPS: usize = 4;
        let prompts: Vec<Vec<u32>> = (0..12).map(|i| ids(i as u64, 12 + STEPS + 7 * i)).collect();
        let mut sessions: Vec<Session> = (0..12).map(|i| gpu.session(of(i), prompts[i].len()).unwrap()).collect();
        let mut buffers = Buffers::default();
        let mut ours: Vec<Vec<Vec<f32>>> = Vec::new();
        {
            let begin = |(session, ids)| -> Prompt {
                let (session, ids): (&mut Session, &Vec<u32>) = (session, ids);
                Prompt { session, tokens: &ids[..ids.len() - STEPS] }
            };
            let mut all: Vec<Prompt> = sessions.iter_mut().zip(&prompts).map(begin).collect();
            let first = gpu.prefill(&mut all, &mut buffers).unwrap();
            ours.extend(first.into_iter().map(|row| vec![row.unwrap()]));
        }
        for step in 0..STEPS - 1 {
            let next = |(session, ids): (_, &Vec<u32>)| Next { session, token: ids[ids.len() - STEPS + step] };
            let mut batch: Vec<Next> = sessions.iter_mut().zip(&prompts).map(next).collect();
            gpu.decode(&mut batch, &mut buffers).unwrap();
            (0..12).for_each(|i| ours[i].push(buffers.logits(i).unwrap().to_vec()));
        }
        for (i, ids) in prompts.iter().enumerate() {
            let (theirs, _) = run(&cpu, of(i), ids, ids.len() - STEPS, None);
            let distance = Distance::between(&ours[i], &theirs);
            eprintln!("{i}: {distance:?}");
            assert!(distance.max < 0.1, "{i}: {distance:?}");
        }
    });
}

/// One token by the program on the recall model, from a prompt of `n` tokens.
fn generate(folder: &Path, n: usize, linear: &str, env: &[(&str, &str)]) -> Output {
    generate_tokens(folder, n, 1, linear, env)
}

fn generate_tokens(folder: &Path, n: usize, n_predict: usize, linear: &str, env: &[(&str, &str)]) -> Output {
    // Of each test, as others may write theirs while this one's is read.
    let test = std::thread::current().name().unwrap_or("main").to_string();
    let tokens = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cuda_linear_{test}_{n}.json"));
    fs::write(&tokens, serde_json::to_string(&(0..n).map(|i| 300 + i).collect::<Vec<_>>()).unwrap()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_specache-engine"));
    command.args(["generate", "--temp", "0", "--ignore-eos", "--device", "cuda", "--linear", linear, "-m"]);
    command.arg(fixture("recall")).arg("--tokens").arg(tokens).arg("-n").arg(n_predict.to_string());
    command.envs(env.iter().copied());
    with_libraries(&mut command, folder).output().unwrap()
}

/// The recall model has four layers of four products each: q, k and v lie side by side and are one, gate and up too. A
/// fifth kind makes the logits of the last row, which `auto` leaves to the fused kernels.
#[test]
fn rows_decide_which_path_runs() {
    let Some(folder) = emulation() else { return };
    for (n, linear, products) in
        [(8, "auto", 0), (9, "auto", 16), (40, "fused", 0), (1, "cublas", 17), (40, "cublas", 17)]
    {
        let log = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cuda_linear_{n}_{linear}.log"));
        let _ = fs::remove_file(&log);
        let output = generate(&folder, n, linear, &[("SPECACHE_EMU_LOG", log.to_str().unwrap())]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let log = fs::read_to_string(&log).unwrap();
        let counted = log.lines().filter(|line| line.contains("\"matmul\"")).count();
        assert_eq!(counted, products, "{n} rows, {linear}");
    }
}

/// A pass that is replayed as a graph has its products in it: the engine makes no more calls, however long it goes on.
#[test]
fn replayed_passes_call_cublas_no_more() {
    let Some(folder) = emulation() else { return };
    let products = |n_predict: usize| {
        let log = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cuda_linear_graph_{n_predict}.log"));
        let _ = fs::remove_file(&log);
        let env = [("SPECACHE_EMU_LOG", log.to_str().unwrap())];
        let output = generate_tokens(&folder, 20, n_predict, "cublas", &env);
        assert!(output.status.success(), "{}", text(&output.stderr));
        fs::read_to_string(&log).unwrap().lines().filter(|line| line.contains("\"matmul\"")).count()
    };
    assert_eq!(products(8), products(12));
}

#[test]
fn a_missing_or_broken_library_is_named() {
    let Some(folder) = emulation() else { return };
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda_linear_libraries");
    let _ = fs::remove_dir_all(&place);
    fs::create_dir_all(&place).unwrap();
    for name in ["libcuda.so.1", "libnvrtc.so"] {
        symlink(folder.join("libspecache_emu.so"), place.join(name)).unwrap();
    }
    let expect = |missing: &str| {
        let output = generate(&place, 20, "cublas", &[]);
        let err = text(&output.stderr);
        assert!(output.status.code() == Some(5) && err.contains(missing), "{:?}: {err}", output.status);
        let output = generate(&place, 20, "auto", &[]);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        let lines = err.lines().filter(|line| line.starts_with("specache: the fused kernels compute all products"));
        let lines: Vec<&str> = lines.collect();
        assert!(output.status.success() && !out.is_empty(), "{err}");
        assert!(lines.len() == 1 && lines[0].contains(missing), "{err}");
        assert!(!text(&generate(&place, 20, "fused", &[]).stderr).contains("cublas"), "fused looks for nothing");
    };
    let source = place.join("empty.c");
    fs::write(&source, "int nothing;\n").unwrap();
    let mut gcc = Command::new("gcc");
    let broken = place.join("libcublasLt.so");
    assert!(gcc.args(["-shared", "-fPIC", "-o"]).arg(&broken).arg(&source).status().unwrap().success());
    expect("libcublasLt has no cublasLt");
    fs::remove_file(&broken).unwrap();
    // A machine that has the real one cannot show what happens without.
    let mut ldconfig = Command::new("/sbin/ldconfig");
    let known = ldconfig.arg("-p").output().map(|output| text(&output.stdout)).unwrap_or_default();
    if known.contains("libcublasLt") || Path::new("/usr/local/cuda/lib64").is_dir() {
        eprintln!("not tested: a missing cuBLASLt, because this machine has one");
    } else {
        expect("libcublasLt.so is not where the system looks");
    }
}

/// The first product; one in the middle, or its execution, which has the same name and comes when it likes; the choice of
/// an algorithm; the handle.
#[test]
fn failing_calls_are_errors_that_name_the_product() {
    let Some(folder) = emulation() else { return };
    for (fail, words) in [
        ("cublasLtMatmul:1:700", "a product of 20 rows, 256 to 512 features: cublasLtMatmul failed with 13"),
        ("product:3:700", "Emulated GPU: "),
        ("cublasLtMatmulAlgoGetHeuristic:2:1", "256 to 256 features: cublasLtMatmulAlgoGetHeuristic failed with 15"),
    ] {
        let output = generate(&folder, 20, "cublas", &[("SPECACHE_EMU_FAIL", fail)]);
        let err = text(&output.stderr);
        assert!(output.status.code() == Some(5) && err.contains(words), "{fail}: {:?}: {err}", output.status);
    }
    let output = generate(&folder, 20, "cublas", &[("SPECACHE_EMU_FAIL", "cublasLtCreate:1:1")]);
    let err = text(&output.stderr);
    assert!(output.status.code() == Some(5) && err.contains("cublasLtCreate failed with 1"), "{err}");
}

/// A product that fails spoils its own call, and the engine goes on.
#[test]
fn a_failed_product_leaves_the_next_request_alone() {
    let fail = [("SPECACHE_EMU_FAIL", "cublasLtMatmul:7:700")];
    on_emulation("a_failed_product_leaves_the_next_request_alone", &fail, || {
        let gpu = on_gpu(narrow(SHAPE, Dtype::Bf16, Dtype::Bf16), LinearPath::Cublas).unwrap();
        let (mut buffers, tokens) = (Buffers::default(), ids(5, 70));
        let mut prefill = || {
            let mut session = gpu.session(kv(KvMode::Full, 2, 64, 64, 0), 80).unwrap();
            gpu.prefill(&mut [Prompt { session: &mut session, tokens: &tokens }], &mut buffers)?.remove(0)
        };
        let failed = prefill().unwrap_err();
        assert!(failed.exit_code() == 5 && failed.to_string().contains("cublasLtMatmul"), "{failed}");
        assert!(prefill().unwrap().iter().all(|x| x.is_finite()));
    });
}

/// Prompts that are given up while the GPU still works on them: at each interruption, and at each buffer that cannot be had.
/// Nothing is freed under its products, and the same call again gives the bits of a call that nothing disturbs.
#[test]
fn a_prefill_that_is_given_up_frees_nothing_in_use() {
    on_emulation("a_prefill_that_is_given_up_frees_nothing_in_use", &[], || {
        let prompts = [ids(7, 70), ids(8, 24)];
        let run = |faults: Option<Arc<Faults>>| {
            let options = DeviceOptions { linear: LinearPath::Cublas, faults: faults.clone(), ..options(2) };
            let device = Device::cuda(0, &options).unwrap();
            let gpu = Engine::new(narrow(SHAPE, Dtype::Bf16, Dtype::Bf16), device).ok()?;
            let options = kv(KvMode::SpeCache, 2, 64, 64, 64);
            let mut sessions = (gpu.session(options, 80).ok()?, gpu.session(options, 80).ok()?);
            let mut prefill = || {
                let (a, b) = (&mut sessions.0, &mut sessions.1);
                let mut both = [Prompt { session: a, tokens: &prompts[0] }, Prompt { session: b, tokens: &prompts[1] }];
                gpu.prefill(&mut both, &mut Buffers::default())
            };
            let again = match prefill() {
                Err(Error::Interrupted | Error::OutOfMemory { .. }) if faults.is_some() => {
                    gpu.interrupt_flag().store(false, Ordering::Relaxed);
                    prefill()
                }
                first => first,
            };
            Some(again.unwrap().into_iter().map(Result::unwrap).collect::<Vec<_>>())
        };
        let undisturbed = run(None).unwrap();
        for kind in [Fault::Interrupt, Fault::Buffer] {
            let struck = (0..).take_while(|&index| {
                let faults = Arc::new(Faults::at(kind, index));
                let logits = run(Some(faults.clone()));
                assert!(logits.is_none_or(|logits| logits == undisturbed), "{kind:?} {index}");
                faults.has_struck()
            });
            let most = struck.count();
            assert!(most >= 6, "{kind:?}: {most} opportunities; two prompts of three layers have more");
        }
    });
}

#[test]
fn fp32_weights_are_left_to_the_fused_kernels() {
    on_emulation("fp32_weights_are_left_to_the_fused_kernels", &[], || {
        let refused = on_gpu(SHAPE.model(), LinearPath::Cublas).err().unwrap();
        assert!(refused.exit_code() == 2 && refused.to_string().contains("layer 0 has fp32 weights"), "{refused}");
        let mut model = narrow(SHAPE, Dtype::Bf16, Dtype::F16);
        model.weights.layers[2].down = SHAPE.model().weights.layers.remove(2).down;
        let refused = on_gpu(model, LinearPath::Cublas).err().unwrap();
        assert!(refused.to_string().contains("layer 2 has fp32 weights"), "{refused}");
        let ids = ids(2, 30);
        let options = kv(KvMode::Full, 2, 64, 64, 0);
        let (fused, _) = run(&on_gpu(SHAPE.model(), LinearPath::Fused).unwrap(), options, &ids, 24, None);
        let (auto, _) = run(&on_gpu(SHAPE.model(), LinearPath::Auto).unwrap(), options, &ids, 24, None);
        assert_eq!(fused, auto);
    });
}

/// 4 GiB of emulated memory, and a budget that has room for the weights but not for the 32 MiB that cuBLASLt works in.
#[test]
fn the_workspace_comes_from_the_budget() {
    on_emulation("the_workspace_comes_from_the_budget", &[], || {
        let with_budget = |linear, budget: u64| {
            let device = Device::cuda(0, &DeviceOptions { linear, device_budget: Some(budget), ..options(2) }).unwrap();
            (Engine::new(narrow(SHAPE, Dtype::Bf16, Dtype::Bf16), device.clone()), device)
        };
        let (refused, _) = with_budget(LinearPath::Cublas, 32 << 20);
        let refused = refused.err().unwrap();
        assert!(refused.exit_code() == 4 && refused.to_string().contains("workspace of cuBLASLt"), "{refused}");
        let (engine, device) = with_budget(LinearPath::Cublas, 40 << 20);
        assert!(engine.is_ok() && device.device_memory().used() >= 32 << 20);
        drop(engine);
        assert_eq!(device.device_memory().used(), 0);
        let (engine, device) = with_budget(LinearPath::Auto, 32 << 20);
        assert!(engine.is_ok() && device.device_memory().used() < 1 << 20, "the fused kernels do without");
    });
}

#[test]
fn the_cpu_device_has_no_cublas() {
    let refused = Device::cpu(&DeviceOptions { linear: LinearPath::Cublas, ..options(1) }).err().unwrap();
    assert!(refused.exit_code() == 2 && refused.to_string().contains("--linear cublas needs a GPU"), "{refused}");
}
