//! The RoPE fields of `config.json`: `rope_theta` with `rope_scaling`, or the newer `rope_parameters`.
//!
//! Names, defaults and precedence follow Hugging Face transformers (`modeling_rope_utils.py`), except that values it
//! only warns about are refused here.

use super::config::MAX_POSITIONS;
use super::fields::Fields;
use super::{Rope, RopeScaling};
use crate::error::Result;

const DEFAULT_THETA: f64 = 10_000.0;
const ROPE_TYPES: &str = "default, linear, dynamic, llama3, yarn";

/// Reads the RoPE of a model whose `max_position_embeddings` is `max_positions`.
pub(super) fn parse(top: &Fields, max_positions: usize) -> Result<Rope> {
    refuse_partial(top)?;
    let scaling = match top.object("rope_scaling")? {
        Some(fields) => Some(fields),
        None => top.object("rope_parameters")?,
    };
    let Some(fields) = scaling else {
        return Ok(Rope { theta: theta(top)?.unwrap_or(DEFAULT_THETA), scaling: RopeScaling::Default });
    };
    refuse_partial(&fields)?;
    let theta = match theta(&fields)? {
        Some(theta) => theta,
        None => theta_of_file(top)?,
    };
    Ok(Rope { theta, scaling: scaling_of(top, &fields, max_positions)? })
}

fn theta_of_file(top: &Fields) -> Result<f64> {
    Ok(theta(top)?.unwrap_or(DEFAULT_THETA))
}

/// At most 1e30, so that every frequency is a normal f32.
fn theta(fields: &Fields) -> Result<Option<f64>> {
    fields.number("rope_theta", "above 1 and at most 1e30", |x| x > 1.0 && x <= 1e30)
}

fn refuse_partial(fields: &Fields) -> Result<()> {
    match fields.number("partial_rotary_factor", "", |_| true)? {
        None | Some(1.0) => Ok(()),
        Some(_) => Err(fields.error("partial_rotary_factor", "only 1 (rotate the whole head) is supported")),
    }
}

fn scaling_of(top: &Fields, fields: &Fields, max_positions: usize) -> Result<RopeScaling> {
    let name = if fields.get("rope_type").is_some() { "rope_type" } else { "type" };
    match fields.text(name)? {
        None if fields.nested() => {
            Err(fields.error("rope_type", "one RoPE per layer type is not supported; only a single one is"))
        }
        None | Some("default") => Ok(RopeScaling::Default),
        Some("linear") => Ok(RopeScaling::Linear { factor: required_factor(fields)? }),
        Some("dynamic") => Ok(RopeScaling::Dynamic { factor: required_factor(fields)? }),
        Some("llama3") => llama3(top, fields, max_positions),
        Some("yarn") => yarn(top, fields, max_positions),
        Some(_) => Err(fields.error(name, format!("this RoPE is not known; valid are {ROPE_TYPES}"))),
    }
}

/// At least 1 (Hugging Face warns below), and bounded so that frequencies stay normal f32 numbers.
fn factor(fields: &Fields) -> Result<Option<f64>> {
    fields.number("factor", "from 1 to 1e6", |x| (1.0..=1e6).contains(&x))
}

fn required_factor(fields: &Fields) -> Result<f64> {
    factor(fields)?.ok_or_else(|| fields.error("factor", "this RoPE needs it: a number from 1 to 1e6"))
}

/// At the top of the file (wins), else in the RoPE object, else `max_position_embeddings`.
fn original_max_positions(top: &Fields, fields: &Fields, max_positions: usize) -> Result<usize> {
    const NAME: &str = "original_max_position_embeddings";
    Ok(match top.count(NAME, MAX_POSITIONS)? {
        Some(n) => n,
        None => fields.count(NAME, MAX_POSITIONS)?.unwrap_or(max_positions),
    })
}

fn llama3(top: &Fields, fields: &Fields, max_positions: usize) -> Result<RopeScaling> {
    let required = |name: &str| {
        let positive = fields.number(name, "above 0", |x| x > 0.0)?;
        positive.ok_or_else(|| fields.error(name, "llama3 RoPE needs it: a number above 0"))
    };
    let low_freq_factor = required("low_freq_factor")?;
    let high_freq_factor = required("high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        return Err(fields.error("high_freq_factor", format!("it must exceed low_freq_factor ({low_freq_factor})")));
    }
    Ok(RopeScaling::Llama3 {
        factor: required_factor(fields)?,
        low_freq_factor,
        high_freq_factor,
        original_max_positions: original_max_positions(top, fields, max_positions)?,
    })
}

fn yarn(top: &Fields, fields: &Fields, max_positions: usize) -> Result<RopeScaling> {
    let original_max_positions = original_max_positions(top, fields, max_positions)?;
    let factor = factor(fields)?.unwrap_or(max_positions as f64 / original_max_positions as f64);
    let beta = |name: &str, default: f64| -> Result<f64> {
        // Hugging Face writes `get(name) or default`, so that 0 also means the default.
        let given = fields.number(name, "of at least 0", |x| x >= 0.0)?;
        Ok(given.filter(|&x| x != 0.0).unwrap_or(default))
    };
    let (beta_fast, beta_slow) = (beta("beta_fast", 32.0)?, beta("beta_slow", 1.0)?);
    if beta_fast < beta_slow {
        return Err(fields.error("beta_fast", format!("it must not be below beta_slow ({beta_slow})")));
    }
    Ok(RopeScaling::Yarn {
        factor,
        original_max_positions,
        beta_fast,
        beta_slow,
        attention_factor: attention_factor(fields, factor)?,
        truncate: fields.flag("truncate")?.unwrap_or(true),
    })
}

/// The file's `attention_factor`, else what the YaRN paper suggests: `0.1 ln(factor) + 1`, refined by `mscale` and
/// `mscale_all_dim` where both are given and not 0.
fn attention_factor(fields: &Fields, factor: f64) -> Result<f64> {
    if let Some(given) = fields.number("attention_factor", "above 0 and at most 1e6", |x| x > 0.0 && x <= 1e6)? {
        return Ok(given);
    }
    let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    let mscale = |name: &str| -> Result<Option<f64>> {
        Ok(fields.number(name, "from 0 to 1e6", |x| (0.0..=1e6).contains(&x))?.filter(|&x| x != 0.0))
    };
    Ok(match (mscale("mscale")?, mscale("mscale_all_dim")?) {
        (Some(one), Some(all)) => scale(one) / scale(all),
        _ => scale(1.0),
    })
}
