//! `generation_config.json`: the defaults that a model's makers suggest for sampling.

use std::path::Path;

use super::GenerationConfig;
use super::fields::{Fields, read_text};
use crate::error::Result;

impl GenerationConfig {
    /// Reads `generation_config.json` of a model folder; all fields are absent where there is no such file.
    ///
    /// # Errors
    /// [`crate::error::Error::Model`] naming the field, the value found and its valid range.
    pub fn load(dir: &Path) -> Result<GenerationConfig> {
        let file = dir.join("generation_config.json");
        match read_text(&file)? {
            Some(json) => GenerationConfig::parse(&file, &json),
            None => Ok(GenerationConfig::default()),
        }
    }

    /// Parses the text of a `generation_config.json`; `file` is named in errors. Null counts as absent.
    ///
    /// # Errors
    /// As [`GenerationConfig::load`].
    pub fn parse(file: &Path, json: &str) -> Result<GenerationConfig> {
        let f = Fields::parse(file, json)?;
        Ok(GenerationConfig {
            do_sample: f.flag("do_sample")?,
            temperature: f
                .number("temperature", "of at least 0", |x| x >= 0.0 && single(x).is_finite())?
                .map(|x| x as f32),
            top_k: top_k(&f)?,
            top_p: f.number("top_p", "above 0 and at most 1", |x| single(x) > 0.0 && x <= 1.0)?.map(|x| x as f32),
            min_p: f
                .number("min_p", "of at least 0 and below 1", |x| (0.0..1.0).contains(&single(x)))?
                .map(|x| x as f32),
            repetition_penalty: f
                .number("repetition_penalty", "above 0", |x| single(x) > 0.0 && single(x).is_finite())?
                .map(|x| x as f32),
            eos_token_ids: f.token_ids("eos_token_id")?,
        })
    }
}

/// As the sampler will see it.
fn single(x: f64) -> f32 {
    x as f32
}

/// 0 switches top-k off.
fn top_k(f: &Fields) -> Result<Option<usize>> {
    let Some(value) = f.get("top_k") else { return Ok(None) };
    let k = value.as_u64().and_then(|k| usize::try_from(k).ok());
    k.map(Some).ok_or_else(|| f.error("top_k", "it must be a whole number (0: off)"))
}
