//! Configurations of published models, RoPE tables against Hugging Face transformers, and synthetic weights against
//! numpy.

use std::path::Path;

use specache::error::Error;
use specache::model::{Arch, Config, Dtype, Model, Rope, RopeScaling, RopeTable, synthetic};

fn parse(json: &str) -> Config {
    Config::parse(Path::new("config.json"), json).unwrap()
}

/// (hidden, intermediate, layers, heads, KV heads, head_dim, vocabulary, positions).
fn sizes(c: &Config) -> (usize, usize, usize, usize, usize, usize, usize, usize) {
    let heads = (c.n_heads, c.n_kv_heads, c.head_dim);
    (c.hidden_size, c.intermediate_size, c.n_layers, heads.0, heads.1, heads.2, c.vocab_size, c.max_positions)
}

#[test]
fn llama_2_7b() {
    let c = parse(
        r#"{"_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000}"#,
    );
    assert_eq!(sizes(&c), (4096, 11008, 32, 32, 32, 128, 32000, 4096));
    assert_eq!((c.arch, c.kv_dtype(), c.group_heads()), (Arch::Llama, Dtype::F16, 1));
    assert_eq!(c.rope, Rope { theta: 10_000.0, scaling: RopeScaling::Default });
    assert_eq!((c.rms_norm_eps, c.sliding_window, c.max_context()), (1e-5, None, None));
    assert_eq!((c.bos_token_id, &c.eos_token_ids[..]), (Some(1), &[2][..]));
}

#[test]
fn llama_3_1_8b() {
    let c = parse(
        r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 128256}"#,
    );
    assert_eq!(sizes(&c), (4096, 14336, 32, 32, 8, 128, 128256, 131072));
    assert_eq!(c.eos_token_ids, [128001, 128008, 128009]);
    assert_eq!((c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm), (false, false, false, false));
    assert_eq!(c.rope, llama3(8.0));
    assert_eq!(Config { eos_token_ids: vec![128001], ..c }, synthetic::config("llama-3.1-8b").unwrap());
}

fn llama3(factor: f64) -> Rope {
    let (low_freq_factor, high_freq_factor, original_max_positions) = (1.0, 4.0, 8192);
    let scaling = RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions };
    Rope { theta: 500_000.0, scaling }
}

#[test]
fn llama_3_2_1b() {
    let c = parse(
        r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
        "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0,
        "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "vocab_size": 128256}"#,
    );
    assert_eq!(sizes(&c), (2048, 8192, 16, 32, 8, 64, 128256, 131072));
    assert!(c.tie_word_embeddings);
    assert_eq!(c.rope, llama3(32.0));
    assert_eq!(c, synthetic::config("llama-3.2-1b").unwrap());
}

#[test]
fn tinyllama() {
    let c = parse(
        r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "vocab_size": 32000}"#,
    );
    assert_eq!(sizes(&c), (2048, 5632, 22, 32, 4, 64, 32000, 2048));
    assert_eq!(c, synthetic::config("tinyllama-1.1b").unwrap());
}

/// The three 7B versions differ in window, vocabulary and theta.
fn mistral_7b(rest: &str) -> Config {
    parse(&format!(
        r#"{{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "tie_word_embeddings": false,
        "max_position_embeddings": 32768, "torch_dtype": "bfloat16", {rest}}}"#
    ))
}

#[test]
fn mistral_7b_versions() {
    let v1 = mistral_7b(r#""rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000"#);
    assert_eq!(sizes(&v1), (4096, 14336, 32, 32, 8, 128, 32000, 32768));
    assert_eq!((v1.arch, v1.sliding_window), (Arch::Mistral, Some(4096)));
    let v2 = mistral_7b(r#""rope_theta": 1000000.0, "sliding_window": null, "vocab_size": 32000"#);
    assert_eq!((v2.sliding_window, v2.rope.theta), (None, 1e6));
    assert_eq!(v2, synthetic::config("mistral-7b-v0.2").unwrap());
    let v3 = mistral_7b(r#""rope_theta": 1000000.0, "sliding_window": null, "vocab_size": 32768"#);
    assert_eq!((v3.sliding_window, v3.vocab_size), (None, 32768));
}

#[test]
fn mistral_defaults_of_absent_fields() {
    let c = parse(
        r#"{"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_hidden_layers": 32, "vocab_size": 32000}"#,
    );
    assert_eq!((c.n_kv_heads, c.sliding_window, c.max_positions), (8, Some(4096), 131072));
    assert_eq!((c.rms_norm_eps, c.rope.theta, c.dtype, c.kv_dtype()), (1e-6, 10_000.0, None, Dtype::Bf16));
    assert_eq!((c.bos_token_id, c.eos_token_ids), (Some(1), vec![2]));
}

#[test]
fn mistral_nemo() {
    let c = parse(
        r#"{"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 14336,
        "max_position_embeddings": 1024000, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 131072}"#,
    );
    assert_eq!(sizes(&c), (5120, 14336, 40, 32, 8, 128, 131072, 1024000));
}

/// Qwen2.5-7B; `rest` overrides nothing and adds fields.
fn qwen2_5_7b(rest: &str) -> String {
    format!(
        r#"{{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 131072, "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "use_cache": true, "use_mrope": false, "vocab_size": 152064{rest}}}"#
    )
}

#[test]
fn qwen2_5() {
    let c = parse(&qwen2_5_7b(r#", "use_sliding_window": false, "sliding_window": 131072, "max_window_layers": 28"#));
    assert_eq!(sizes(&c), (3584, 18944, 28, 28, 4, 128, 152064, 131072));
    assert_eq!((c.arch, c.sliding_window, c.group_heads()), (Arch::Qwen2, None, 7));
    assert_eq!((c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm), (true, false, false, false));
}

#[test]
fn qwen_windows() {
    let window = |rest: &str| {
        let json = qwen2_5_7b(&format!(r#", "use_sliding_window": true, "sliding_window": 512, {rest}"#));
        Config::parse(Path::new("config.json"), &json).map(|c| c.sliding_window).map_err(|e| e.to_string())
    };
    assert_eq!(window(r#""max_window_layers": 0"#), Ok(Some(512)));
    assert_eq!(window(r#""max_window_layers": 28"#), Ok(None));
    assert!(window(r#""max_window_layers": 21"#).unwrap_err().contains("max_window_layers is 21"));
    let types = |n: usize, m: usize| {
        let list: Vec<_> = (0..n + m).map(|i| if i < n { "full_attention" } else { "sliding_attention" }).collect();
        window(&format!(r#""layer_types": {}"#, serde_json::to_string(&list).unwrap()))
    };
    assert_eq!((types(28, 0), types(0, 28)), (Ok(None), Ok(Some(512))));
    assert!(types(14, 14).unwrap_err().contains("layer_types"));
    assert!(types(3, 0).unwrap_err().contains("num_hidden_layers (28)"));
}

#[test]
fn qwen3_8b() {
    let c = parse(
        r#"{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
        "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936}"#,
    );
    assert_eq!(sizes(&c), (4096, 12288, 36, 32, 8, 128, 151936, 40960));
    assert_eq!((c.arch, c.qk_norm, c.qkv_bias, c.o_bias), (Arch::Qwen3, true, false, false));
    // Qwen3-0.6B's heads are wider than its hidden size; its class has head_dim 128 where the file says nothing.
    let small = parse(
        r#"{"architectures": ["Qwen3ForCausalLM"], "attention_bias": true, "hidden_size": 1024,
        "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "tie_word_embeddings": true, "vocab_size": 151936, "dtype": "float32", "eos_token_id": null}"#,
    );
    assert_eq!((small.head_dim, small.qkv_bias, small.o_bias), (128, true, true));
    assert_eq!((small.dtype, small.eos_token_ids, small.bos_token_id), (Some(Dtype::F32), vec![], None));
}

#[test]
fn llama_biases() {
    let c = tiny_llama(r#""attention_bias": true, "mlp_bias": true"#);
    assert_eq!((c.qkv_bias, c.o_bias, c.mlp_bias), (true, true, true));
}

/// A Llama with heads of 128 and 131072 positions, plus some fields.
fn tiny_llama(rest: &str) -> Config {
    parse(&format!(
        r#"{{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 1, "num_hidden_layers": 1,
        "num_attention_heads": 32, "vocab_size": 8, "max_position_embeddings": 131072, {rest}}}"#
    ))
}

#[test]
fn rope_fields_old_and_new() {
    let old = tiny_llama(r#""rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2.0}"#);
    let new = tiny_llama(r#""rope_parameters": {"rope_type": "dynamic", "factor": 2, "rope_theta": 500000}"#);
    assert_eq!(old.rope, Rope { theta: 5e5, scaling: RopeScaling::Dynamic { factor: 2.0 } });
    assert_eq!(old.rope, new.rope);
    assert_eq!(old.max_context(), Some(131072));
    let plain = tiny_llama(r#""rope_scaling": {}, "rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}"#);
    assert_eq!(plain.rope, Rope { theta: 7e5, scaling: RopeScaling::Default });
}

/// Some frequencies `(i, inv_freq[i])`, their sum, the attention factor, and cos at position 4095 of the first, the
/// middle and the last pair: printed by `LlamaRotaryEmbedding` of transformers 5.
#[track_caller]
fn check_rope(rest: &str, some: &[(usize, f32)], sum: f64, factor: f64, cos_4095: [f32; 3]) {
    let table = RopeTable::new(&tiny_llama(rest));
    // Two roundings of the power and of the division: 1e-6 relative is 8 ulp.
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b.abs();
    for &(i, expected) in some {
        let got = table.inv_freq[i];
        assert!(close(got.into(), expected.into()), "inv_freq[{i}] is {got}, not {expected}");
    }
    let total: f64 = table.inv_freq.iter().map(|&f| f64::from(f)).sum();
    assert!(close(total, sum), "sum {total}, not {sum}");
    assert!(close(table.attention_factor.into(), factor), "attention factor {}", table.attention_factor);
    let n = table.inv_freq.len();
    let (mut cos, mut sin) = (vec![0.0; n], vec![0.0; n]);
    table.angles(4095, &mut cos, &mut sin);
    for (i, expected) in [0, n / 2, n - 1].into_iter().zip(cos_4095) {
        // The angle of the fastest pair is 4095: one ulp of its frequency is worth 2.4e-4.
        assert!((cos[i] - expected).abs() < 3e-4, "cos[{i}] is {}, not {expected}", cos[i]);
        let norm = f64::from(cos[i]).hypot(sin[i].into());
        assert!(close(norm, factor), "cos and sin of pair {i} have length {norm}");
    }
}

#[test]
fn rope_default_and_linear() {
    let some = [(0, 1.0), (1, 0.865_964_35), (29, 0.015_399_265), (32, 0.01), (63, 1.154_781_9e-4)];
    check_rope(r#""rope_theta": 10000"#, &some, 7.459954202655354, 1.0, [-0.065976, -0.994033, 0.890259]);
    let some = some.map(|(i, f)| (i, f / 4.0));
    let linear = r#""rope_scaling": {"type": "linear", "factor": 4.0}"#;
    check_rope(linear, &some, 1.8649885506638384, 1.0, [0.917437, -0.687524, 0.99302]);
}

#[test]
fn rope_llama3() {
    let scaling = r#""rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}"#;
    let some = [(1, 0.814_617_2), (29, 0.002_166_570_6), (32, 5.248_46e-4), (40, 3.428_102_4e-5), (63, 3.068_926e-7)];
    check_rope(scaling, &some, 5.386058263449144, 1.0, [-0.065976, -0.546725, 0.999999]);
}

#[test]
fn rope_yarn() {
    let qwen = r#""rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 32768}"#;
    let some =
        [(1, 0.805_842_2), (29, 0.001_405_112_4), (32, 6.029_411_4e-4), (40, 4.445_698_5e-5), (63, 3.102_344_4e-7)];
    check_rope(qwen, &some, 5.1440348281193735, 1.138629436111989, [-0.075122, -0.890677, 1.138629]);

    let mscale = r#""rope_scaling": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.707}"#;
    let some = [(29, 0.010_202_013), (32, 0.005_500_000_4), (40, 7.905_694e-4), (48, 2.5e-5), (63, 2.886_954_7e-6)];
    check_rope(mscale, &some, 7.361445988197374, 1.0857263992561355, [-0.071632, -0.936029, 1.085651]);

    let exact = r#""original_max_position_embeddings": 4096,
        "rope_scaling": {"rope_type": "yarn", "factor": 16.0, "truncate": false}"#;
    let some = [(29, 0.010_570_178), (32, 0.005_696_214), (40, 8.164_705e-4), (48, 6.25e-5), (63, 7.217_387e-6)];
    check_rope(exact, &some, 7.371371859379906, 1.2772588722239782, [-0.084268, -0.298579, 1.276701]);

    let given = r#""rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}"#;
    let some = [(40, 0.003_162_277_9), (48, 9.4e-4), (63, 7.390_604e-5)];
    check_rope(given, &some, 7.458849581278628, 1.5, [-0.098964, -1.49105, 1.431827]);
}

#[test]
fn yarn_factor_from_positions() {
    let c = tiny_llama(r#""rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 32768}"#);
    assert!(matches!(c.rope.scaling, RopeScaling::Yarn { factor: 4.0, beta_fast: 32.0, beta_slow: 1.0, .. }));
}

/// The first and the last four numbers as `tools/synthetic_weights.py` prints them.
#[test]
fn synthetic_numbers() {
    let model = Model::load("synthetic:tiny").unwrap();
    let w = &model.weights;
    for (matrix, shape, first, last) in [
        (&w.embed, (512, 128), [0x3f7b, 0xbf6e, 0xbe5c, 0x3f3e], [0x3e32, 0xbf09, 0xbf2e, 0x3f2f]),
        (&w.layers[0].q.weight, (256, 128), [0x3dec, 0x3d37, 0x3dd1, 0x3e03], [0x3d8a, 0xbc96, 0x3df3, 0xbd03]),
        (&w.layers[1].down.weight, (128, 256), [0xbd0d, 0x3dc1, 0xbdbb, 0x3da6], [0xbd84, 0xbdd6, 0xbda5, 0xbd52]),
        (&w.lm_head.weight, (512, 128), [0xbd34, 0x3ce8, 0xbd50, 0xbb11], [0x3e04, 0xbd81, 0x3d88, 0x3dad]),
    ] {
        let bits: Vec<u16> = matrix.bytes().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        assert_eq!((matrix.rows(), matrix.cols(), matrix.dtype()), (shape.0, shape.1, Dtype::Bf16));
        assert_eq!((&bits[..4], &bits[bits.len() - 4..]), (&first[..], &last[..]));
    }
    assert!(model.synthetic);
    assert_eq!(w.final_norm, vec![1.0; 128]);
}

/// Chunks filled by different threads join without a seam, and the numbers have the promised spread.
#[test]
fn synthetic_statistics() {
    let model = Model::load("synthetic:tiny").unwrap();
    let mut row = vec![0.0; 128];
    let (mut sum, mut squares) = (0.0, 0.0);
    for i in 0..512 {
        model.weights.lm_head.weight.row_f32(i, &mut row);
        sum += row.iter().map(|&x| f64::from(x)).sum::<f64>();
        squares += row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    }
    let n = 512.0 * 128.0;
    // Variance 1 / 128; five standard errors of 65,536 uniform numbers.
    assert!((sum / n).abs() < 5.0 * (1.0 / 128.0f64).sqrt() / n.sqrt(), "mean {}", sum / n);
    assert!((squares / n * 128.0 - 1.0).abs() < 5.0 * 0.9 / n.sqrt(), "variance {}", squares / n);
}

#[test]
fn synthetic_shapes() {
    for shape in synthetic::shapes() {
        let config = synthetic::config(shape).unwrap();
        assert_eq!(config.dtype, Some(Dtype::Bf16), "{shape}");
    }
    let error = Model::load("synthetic:gpt-5").map(drop).unwrap_err();
    assert!(matches!(error, Error::Usage(_)));
    let message = error.to_string();
    assert!(synthetic::shapes().all(|shape| message.contains(shape)), "{message}");
}

/// Weights are mapped and not copied: every matrix lies in the mapping of its file, the tied LM head on the embedding.
#[test]
fn weights_are_mapped() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/recall");
    let model = Model::load(folder).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let address = |hex: &str| usize::from_str_radix(hex, 16).unwrap();
    let file = maps.lines().find(|line| line.ends_with("recall/model.safetensors")).expect("the file is mapped");
    let (start, end) = file.split_once(' ').unwrap().0.split_once('-').unwrap();
    let weights = &model.weights;
    let layers = weights.layers.iter().flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]);
    for matrix in layers.map(|linear| &linear.weight).chain([&weights.embed, &weights.lm_head.weight]) {
        let range = matrix.bytes().as_ptr_range();
        assert!(
            address(start) <= range.start as usize && range.end as usize <= address(end),
            "{range:?} outside {file}"
        );
    }
    assert_eq!(weights.embed.bytes().as_ptr(), weights.lm_head.weight.bytes().as_ptr());
}
