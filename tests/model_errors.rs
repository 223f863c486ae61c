//! Every malformed model folder gives an error that names the file, the thing and the fix, with exit code 3. Nothing
//! panics.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use specache::error::Error;
use specache::model::{Config, GenerationConfig, Model};
use specache::tokenizer::Tokenizer;

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/recall");
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A copy of the recall model that a test damages; removed when the test ends.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Folder {
        let dir = std::env::temp_dir().join(format!("specache-{}-{test}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for file in ["config.json", "generation_config.json", "tokenizer.json", WEIGHTS] {
            std::fs::copy(Path::new(FIXTURE).join(file), dir.join(file)).unwrap();
        }
        Folder(dir)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }

    fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(file), bytes).unwrap();
    }

    fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.path(file)).unwrap()
    }

    fn remove(&self, file: &str) {
        std::fs::remove_file(self.path(file)).unwrap();
    }

    /// Changes config.json.
    fn config(&self, edit: impl FnOnce(&mut Value)) {
        let mut config: Value = serde_json::from_slice(&self.read("config.json")).unwrap();
        edit(&mut config);
        self.write("config.json", config.to_string());
    }

    /// Changes the header of the weights, leaving the data as it is.
    fn header(&self, edit: impl FnOnce(&mut Value)) {
        let bytes = self.read(WEIGHTS);
        let (mut header, data) = split(&bytes);
        edit(&mut header);
        self.write(WEIGHTS, join(&header, data));
    }

    /// Cuts the weights into two shards with an index.
    fn shard(&self) {
        let bytes = self.read(WEIGHTS);
        let (header, data) = split(&bytes);
        let mut tensors: Vec<_> =
            header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__").collect();
        tensors.sort_by_key(|(_, info)| info["data_offsets"][0].as_u64());
        let mut weight_map = serde_json::Map::new();
        for (i, part) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
            let file = format!("model-0000{}-of-00002.safetensors", i + 1);
            let start = part[0].1["data_offsets"][0].as_u64().unwrap();
            let mut header = json!({});
            let mut end = start;
            for (name, info) in part {
                end = info["data_offsets"][1].as_u64().unwrap();
                let mut info = (*info).clone();
                info["data_offsets"] = json!([info["data_offsets"][0].as_u64().unwrap() - start, end - start]);
                header[name.as_str()] = info;
                weight_map.insert(name.to_string(), json!(file));
            }
            self.write(&file, join(&header, &data[start as usize..end as usize]));
        }
        self.remove(WEIGHTS);
        self.write(INDEX, json!({ "metadata": {}, "weight_map": weight_map }).to_string());
    }

    /// Changes the index of a sharded model.
    fn index(&self, edit: impl FnOnce(&mut Value)) {
        let mut index: Value = serde_json::from_slice(&self.read(INDEX)).unwrap();
        edit(&mut index);
        self.write(INDEX, index.to_string());
    }

    fn load(&self) -> Result<Model, Error> {
        Model::load(self.0.to_str().unwrap())
    }

    /// Loading fails with exit code 3 and a message with all of `words`.
    #[track_caller]
    fn fails_with(&self, words: &[&str]) {
        assert_fails(self.load().map(drop), words);
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[track_caller]
fn assert_fails(result: Result<(), Error>, words: &[&str]) {
    let error = result.expect_err("this must fail");
    let message = error.to_string();
    assert_eq!(error.exit_code(), 3, "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

fn split(bytes: &[u8]) -> (Value, &[u8]) {
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + n]).unwrap(), &bytes[8 + n..])
}

fn join(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

// The undamaged model.

#[test]
fn intact() {
    let model = Folder::new("intact").load().unwrap();
    assert_eq!(model.weights.layers.len(), 4);
    assert_eq!(model.weights.embed.rows(), 1536);
    assert_eq!(model.weights.lm_head.weight.bytes().as_ptr(), model.weights.embed.bytes().as_ptr(), "tied, not copied");
    assert_eq!(model.config.eos_token_ids, [1]);
    assert_eq!(model.generation.do_sample, Some(false));
}

#[test]
fn intact_in_shards() {
    let folder = Folder::new("shards");
    let whole = folder.load().unwrap();
    folder.shard();
    let shards = folder.load().unwrap();
    for (a, b) in whole.weights.layers.iter().zip(&shards.weights.layers) {
        assert_eq!(a.down.weight.bytes(), b.down.weight.bytes());
        assert_eq!(a.input_norm, b.input_norm);
    }
    assert_eq!(whole.weights.final_norm, shards.weights.final_norm);
}

#[test]
fn untied_needs_lm_head() {
    let folder = Folder::new("untied");
    folder.config(|c| c["tie_word_embeddings"] = json!(false));
    folder.fails_with(&["lm_head.weight is missing", "[1536, 256]", WEIGHTS]);
}

#[test]
fn announced_bias_must_exist() {
    let folder = Folder::new("bias");
    folder.config(|c| c["attention_bias"] = json!(true));
    folder.fails_with(&["model.layers.0.self_attn.q_proj.bias is missing"]);
}

#[test]
fn generation_config_eos_wins() {
    let folder = Folder::new("eos");
    folder.write("generation_config.json", r#"{"eos_token_id": [7, 9], "temperature": null}"#);
    assert_eq!(folder.load().unwrap().config.eos_token_ids, [7, 9]);
    folder.remove("generation_config.json");
    assert_eq!(folder.load().unwrap().config.eos_token_ids, [1]);
}

// The folder.

#[test]
fn folder_missing() {
    assert_fails(Model::load("/no/such/folder").map(drop), &["/no/such/folder", "no such folder", "synthetic:"]);
}

#[test]
fn file_instead_of_folder() {
    let file = format!("{FIXTURE}/config.json");
    assert_fails(Model::load(&file).map(drop), &["config.json", "is a file, not a folder"]);
}

#[test]
fn config_missing() {
    let folder = Folder::new("config-missing");
    folder.remove("config.json");
    folder.fails_with(&["config.json", "no such file"]);
}

#[test]
fn weights_missing() {
    let folder = Folder::new("weights-missing");
    folder.remove(WEIGHTS);
    folder.fails_with(&["neither model.safetensors nor model.safetensors.index.json"]);
}

#[test]
fn weights_are_a_folder() {
    let folder = Folder::new("weights-folder");
    folder.remove(WEIGHTS);
    std::fs::create_dir(folder.path(WEIGHTS)).unwrap();
    folder.fails_with(&[WEIGHTS, "not a regular file"]);
}

// config.json.

#[test]
fn config_not_json() {
    let folder = Folder::new("config-not-json");
    for text in ["", "{", "hidden_size: 256", "{\"hidden_size\": NaN}"] {
        folder.write("config.json", text);
        folder.fails_with(&["config.json", "not valid JSON"]);
    }
    folder.write("config.json", "[1, 2]");
    folder.fails_with(&["must be a JSON object"]);
    folder.write("config.json", [0xFF, 0xFE]);
    folder.fails_with(&["config.json", "not UTF-8"]);
}

/// One field of a valid config replaced: the error has `words`.
#[track_caller]
fn config_fails(field: &str, value: Value, words: &[&str]) {
    let text = std::fs::read_to_string(format!("{FIXTURE}/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config[field] = value;
    assert_fails(Config::parse(Path::new("x/config.json"), &config.to_string()).map(drop), words);
}

#[test]
fn config_wrong_types() {
    config_fails("hidden_size", json!("256"), &["x/config.json", "field hidden_size is \"256\"", "whole number"]);
    config_fails("hidden_size", json!(256.5), &["field hidden_size is 256.5", "whole number"]);
    config_fails("num_hidden_layers", json!([4]), &["field num_hidden_layers is [4]"]);
    config_fails("vocab_size", json!(-1), &["field vocab_size is -1"]);
    config_fails("rms_norm_eps", json!("small"), &["field rms_norm_eps is \"small\"", "number"]);
    config_fails("rms_norm_eps", json!(-1.0), &["field rms_norm_eps is -1.0", "from 1e-37 to 1"]);
    config_fails("rope_theta", json!(0), &["field rope_theta is 0", "above 1"]);
    config_fails("tie_word_embeddings", json!(1), &["field tie_word_embeddings is 1", "true or false"]);
    config_fails("model_type", json!(7), &["field model_type is 7", "string"]);
    config_fails("torch_dtype", json!("int8"), &["field torch_dtype is \"int8\"", "bfloat16, float16, float32"]);
    config_fails("eos_token_id", json!("</s>"), &["field eos_token_id is \"</s>\"", "list of token ids"]);
    config_fails("bos_token_id", json!(1536), &["field bos_token_id is 1536", "below vocab_size (1536)"]);
    config_fails("rope_scaling", json!("linear"), &["field rope_scaling is \"linear\"", "object or null"]);
    config_fails("partial_rotary_factor", json!(0.5), &["field partial_rotary_factor is 0.5", "only 1"]);
}

#[test]
fn config_missing_sizes() {
    for field in ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"] {
        config_fails(field, json!(null), &[&format!("field {field} is null"), "the model needs it"]);
    }
    assert_fails(Config::parse(Path::new("c"), "{}").map(drop), &["field model_type is missing", "llama, mistral"]);
}

#[test]
fn config_zero_heads() {
    config_fails("num_attention_heads", json!(0), &["field num_attention_heads is 0", "from 1 to"]);
    config_fails("num_key_value_heads", json!(0), &["field num_key_value_heads is 0", "from 1 to"]);
}

#[test]
fn config_heads_do_not_divide() {
    config_fails("num_key_value_heads", json!(3), &["field num_key_value_heads is 3", "num_attention_heads (4)"]);
    config_fails("num_key_value_heads", json!(8), &["field num_key_value_heads is 8", "must divide"]);
    config_fails("head_dim", json!(63), &["field head_dim is 63", "even"]);
}

#[test]
fn config_huge_dimensions() {
    for field in ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"] {
        for huge in [json!(1u64 << 40), json!(u64::MAX), json!(1e30)] {
            config_fails(field, huge, &[&format!("field {field} is"), "from 1 to"]);
        }
    }
    config_fails("head_dim", json!(1 << 20), &["field head_dim is 1048576"]);
    config_fails("max_position_embeddings", json!(u64::MAX), &["field max_position_embeddings"]);
}

#[test]
fn config_unknown_family() {
    config_fails("model_type", json!("gpt2"), &["field model_type is \"gpt2\"", "llama, mistral, qwen2, qwen3"]);
}

#[test]
fn config_unsupported_features() {
    config_fails("quantization_config", json!({"quant_method": "awq"}), &["field quantization_config", "awq", "bf16"]);
    config_fails("hidden_act", json!("gelu"), &["field hidden_act is \"gelu\"", "only silu"]);
}

#[test]
fn config_rope() {
    let valid = "default, linear, dynamic, llama3, yarn";
    config_fails("rope_scaling", json!({"rope_type": "longrope"}), &["rope_scaling.rope_type is \"longrope\"", valid]);
    config_fails("rope_scaling", json!({"type": "mrope"}), &["rope_scaling.type is \"mrope\"", valid]);
    config_fails("rope_parameters", json!({"rope_type": "su"}), &["rope_parameters.rope_type is \"su\"", valid]);
    config_fails("rope_scaling", json!({"type": "linear"}), &["rope_scaling.factor is missing"]);
    config_fails("rope_scaling", json!({"type": "linear", "factor": 0}), &["rope_scaling.factor is 0", "from 1"]);
    config_fails("rope_scaling", json!({"type": "linear", "factor": [2]}), &["rope_scaling.factor is [2]"]);
    let llama3 = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4});
    config_fails("rope_scaling", llama3, &["rope_scaling.high_freq_factor is 4", "exceed"]);
    let layers = json!({"full_attention": {"rope_type": "default"}});
    config_fails("rope_parameters", layers, &["per layer type"]);
}

/// Any value in any field: an error or a config, never a panic.
#[test]
fn config_never_panics() {
    let text = std::fs::read_to_string(format!("{FIXTURE}/config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    let extra = ["head_dim", "rope_scaling", "sliding_window", "layer_types", "max_window_layers", "dtype"];
    let fields = config.as_object().unwrap().keys().map(String::as_str).chain(extra);
    let nested = |v: &Value| json!({"rope_type": "yarn", "factor": v, "beta_fast": v, "beta_slow": v, "mscale": v});
    let plain = [json!(null), json!(true), json!(-1), json!(0), json!(1), json!(1e-300), json!(1e300), json!(u64::MAX)];
    let others = [json!("x"), json!([]), json!({}), json!([1, "x"]), json!({"type": {"type": 1}})];
    let values: Vec<Value> = plain.iter().map(nested).chain(plain.clone()).chain(others).collect();
    for field in fields {
        for model_type in ["llama", "mistral", "qwen2", "qwen3"] {
            for value in &values {
                let mut config = config.clone();
                config["model_type"] = json!(model_type);
                config["use_sliding_window"] = json!(true);
                config[field] = value.clone();
                if let Ok(config) = Config::parse(Path::new("c"), &config.to_string()) {
                    let table = specache::model::RopeTable::new(&config);
                    assert!(table.inv_freq.iter().all(|f| f.is_finite()), "{field} = {value}");
                }
            }
        }
    }
}

// model.safetensors.

#[test]
fn safetensors_empty() {
    let folder = Folder::new("empty");
    for len in [0, 1, 7] {
        folder.write(WEIGHTS, vec![0; len]);
        folder.fails_with(&[WEIGHTS, "too few", "truncated"]);
    }
    folder.write(WEIGHTS, [0; 8]);
    folder.fails_with(&[WEIGHTS, "not valid JSON"]);
}

#[test]
fn safetensors_header_length() {
    let folder = Folder::new("header-length");
    let mut bytes = folder.read(WEIGHTS);
    for (length, words) in [(u64::MAX, "above 100 MB"), (1 << 40, "above 100 MB"), (90_000_000, "runs beyond the end")]
    {
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        folder.write(WEIGHTS, &bytes);
        folder.fails_with(&[WEIGHTS, words]);
    }
}

#[test]
fn safetensors_header_not_json() {
    let folder = Folder::new("header-not-json");
    let mut bytes = folder.read(WEIGHTS);
    bytes[8] = b'!';
    folder.write(WEIGHTS, &bytes);
    folder.fails_with(&[WEIGHTS, "header is not valid JSON"]);
    bytes[9] = 0xFF;
    folder.write(WEIGHTS, &bytes);
    folder.fails_with(&[WEIGHTS, "header is not UTF-8"]);
}

const NORM: &str = "model.layers.1.input_layernorm.weight";

#[test]
fn safetensors_overlap() {
    let folder = Folder::new("overlap");
    folder.header(|h| {
        let offsets = &mut h[NORM]["data_offsets"];
        *offsets = json!([offsets[0].as_u64().unwrap() - 2, offsets[1].as_u64().unwrap() - 2]);
    });
    folder.fails_with(&[WEIGHTS, NORM, "overlap"]);
}

#[test]
fn safetensors_offsets_out_of_file() {
    let folder = Folder::new("offsets");
    folder.header(|h| h["model.norm.weight"]["data_offsets"][1] = json!(1u64 << 50));
    folder.fails_with(&[WEIGHTS, "offsets do not fit"]);
    folder.header(|h| h["model.norm.weight"]["data_offsets"] = json!([6_295_552, 6_295_552u64 + (1 << 50)]));
    folder.fails_with(&[WEIGHTS, "offsets"]);
    folder.header(|h| {
        h["model.norm.weight"]["data_offsets"] = json!([6_295_552, 6_295_552u64 + (2 << 50)]);
        h["model.norm.weight"]["shape"] = json!([1u64 << 50]);
    });
    folder.fails_with(&[WEIGHTS, "do not end where the file ends"]);
    folder.header(|h| h["model.norm.weight"]["shape"] = json!([u64::MAX, 3]));
    folder.fails_with(&[WEIGHTS, "overflow"]);
}

#[test]
fn safetensors_truncated() {
    let folder = Folder::new("truncated");
    let bytes = folder.read(WEIGHTS);
    folder.write(WEIGHTS, &bytes[..bytes.len() - 1]);
    folder.fails_with(&[WEIGHTS, "6300151 bytes", "truncated"]);
    folder.write(WEIGHTS, &bytes[..1000]);
    folder.fails_with(&[WEIGHTS, "beyond the end", "1000 bytes"]);
}

#[test]
fn safetensors_wrong_dtype() {
    let folder = Folder::new("dtype");
    folder.header(|h| h[NORM]["dtype"] = json!("I16"));
    folder.fails_with(&[WEIGHTS, NORM, "I16", "BF16, F16 and F32"]);
    folder.header(|h| h[NORM]["dtype"] = json!("NF4"));
    folder.fails_with(&[WEIGHTS, "not valid JSON", "NF4"]);
}

#[test]
fn safetensors_wrong_shape() {
    let folder = Folder::new("shape");
    folder.header(|h| h["model.layers.2.mlp.up_proj.weight"]["shape"] = json!([256, 640]));
    folder.fails_with(&[WEIGHTS, "model.layers.2.mlp.up_proj.weight", "[256, 640]", "[640, 256]"]);
}

#[test]
fn embedding_of_another_size() {
    let folder = Folder::new("vocab");
    folder.config(|c| c["vocab_size"] = json!(1500));
    folder.fails_with(&["model.embed_tokens.weight", "[1536, 256]", "[1500, 256]"]);
}

#[test]
fn safetensors_missing_tensor() {
    let folder = Folder::new("missing-tensor");
    folder.header(|h| {
        let norm = h.as_object_mut().unwrap().remove(NORM).unwrap();
        h["unexpected"] = norm;
    });
    folder.fails_with(&[WEIGHTS, NORM, "is missing", "[256]"]);
}

/// A flipped byte in the header is an error or another valid header; reading one is never a panic.
#[test]
fn safetensors_header_never_panics() {
    let folder = Folder::new("header-fuzz");
    let intact = folder.read(WEIGHTS);
    let header_len = u64::from_le_bytes(intact[..8].try_into().unwrap()) as usize;
    for i in (0..8 + header_len).step_by(67) {
        let mut bytes = intact.clone();
        bytes[i] ^= 1 << (i % 7);
        folder.write(WEIGHTS, &bytes);
        if let Err(error) = folder.load() {
            assert_eq!(error.exit_code(), 3, "{error}");
        }
    }
}

// Shards.

const SHARD: &str = "model-00002-of-00002.safetensors";

#[test]
fn shard_missing() {
    let folder = Folder::new("shard-missing");
    folder.shard();
    folder.remove(SHARD);
    folder.fails_with(&[SHARD, "shard is missing", INDEX]);
}

#[test]
fn shard_truncated() {
    let folder = Folder::new("shard-truncated");
    folder.shard();
    let bytes = folder.read(SHARD);
    folder.write(SHARD, &bytes[..bytes.len() / 2]);
    folder.fails_with(&[SHARD, "truncated"]);
}

#[test]
fn index_leaves_the_folder() {
    let folder = Folder::new("index-path");
    folder.shard();
    for bad in ["../model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors", "model.bin", "", ".", ".."] {
        folder.index(|index| index["weight_map"]["model.norm.weight"] = json!(bad));
        folder.fails_with(&[INDEX, "model.norm.weight", &format!("{bad:?}"), "inside the folder"]);
    }
    folder.index(|index| index["weight_map"]["model.norm.weight"] = json!(3));
    folder.fails_with(&[INDEX, "model.norm.weight", "in 3"]);
}

#[test]
fn index_places_a_tensor_wrongly() {
    let folder = Folder::new("index-wrong");
    folder.shard();
    folder.index(|index| index["weight_map"]["model.norm.weight"] = json!("model-00001-of-00002.safetensors"));
    folder.fails_with(&["model-00001-of-00002.safetensors", "model.norm.weight is missing"]);
}

#[test]
fn index_not_json() {
    let folder = Folder::new("index-not-json");
    folder.shard();
    folder.write(INDEX, "weight_map");
    folder.fails_with(&[INDEX, "not valid JSON"]);
    folder.write(INDEX, r#"{"weight_map": []}"#);
    folder.fails_with(&[INDEX, "weight_map is []"]);
    folder.write(INDEX, r#"{"weight_map": {}}"#);
    folder.fails_with(&[INDEX, "model.embed_tokens.weight is missing"]);
}

// The other files.

#[test]
fn tokenizer_broken() {
    let folder = Folder::new("tokenizer");
    let intact = folder.read("tokenizer.json");
    for broken in [&b"{}"[..], b"", b"not json", &intact[..intact.len() / 2], &[0xFF; 9]] {
        folder.write("tokenizer.json", broken);
        assert_fails(
            Tokenizer::load(&folder.0).map(drop),
            &["tokenizer.json", if broken == [0xFF; 9] { "not UTF-8" } else { "not a usable tokenizer" }],
        );
    }
    folder.remove("tokenizer.json");
    assert!(Tokenizer::load(&folder.0).unwrap().is_none());
}

#[test]
fn tokenizer_of_another_model() {
    let folder = Folder::new("tokenizer-vocab");
    let tokenizer = Tokenizer::load(&folder.0).unwrap().unwrap();
    tokenizer.check_vocab(1536).unwrap();
    assert_fails(tokenizer.check_vocab(1000), &["tokenizer.json", "vocab_size of 1000", "has id 1"]);
}

#[test]
fn generation_config_wrong_types() {
    let folder = Folder::new("generation");
    for (text, words) in [
        ("[]", ["must be a JSON object", "[]"]),
        ("{", ["not valid JSON", "generation_config"]),
        (r#"{"temperature": "hot"}"#, ["field temperature is \"hot\"", "at least 0"]),
        (r#"{"temperature": -1}"#, ["field temperature is -1", "at least 0"]),
        (r#"{"top_k": 1.5}"#, ["field top_k is 1.5", "whole number"]),
        (r#"{"top_p": 0}"#, ["field top_p is 0", "at most 1"]),
        (r#"{"min_p": 1}"#, ["field min_p is 1", "below 1"]),
        (r#"{"repetition_penalty": 0}"#, ["field repetition_penalty is 0", "above 0"]),
        (r#"{"do_sample": "yes"}"#, ["field do_sample is \"yes\"", "true or false"]),
        (r#"{"eos_token_id": [1, -2]}"#, ["field eos_token_id is [1,-2]", "list of token ids"]),
    ] {
        folder.write("generation_config.json", text);
        folder.fails_with(&["generation_config.json", words[0], words[1]]);
    }
    let nulls = r#"{"temperature": null, "top_k": null, "eos_token_id": null, "unknown": 1}"#;
    assert_eq!(GenerationConfig::parse(Path::new("g"), nulls).unwrap(), GenerationConfig::default());
}
