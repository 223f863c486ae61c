//! RoPE frequencies, computed in f32 in the order of Hugging Face's `modeling_rope_utils.py`.

use std::f64::consts::PI;

use super::{Config, RopeScaling};

/// Rotation frequencies of one head: the pair `(i, i + head_dim / 2)` turns by `position * inv_freq[i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// `[head_dim / 2]`, radians per position.
    pub inv_freq: Vec<f32>,
    /// Multiplies cos and sin; 1 except for YaRN.
    pub attention_factor: f32,
}

impl RopeTable {
    /// The frequencies of a model. `dynamic` scaling equals `default` within [`Config::max_context`].
    pub fn new(config: &Config) -> RopeTable {
        let unscaled: Vec<f32> = powers(config).map(|p| 1.0 / p).collect();
        let (inv_freq, attention_factor) = match config.rope.scaling {
            RopeScaling::Default | RopeScaling::Dynamic { .. } => (unscaled, 1.0),
            RopeScaling::Linear { factor } => (unscaled.iter().map(|f| f / factor as f32).collect(), 1.0),
            RopeScaling::Llama3 { .. } => (unscaled.iter().map(|&f| llama3(&config.rope.scaling, f)).collect(), 1.0),
            RopeScaling::Yarn { attention_factor, .. } => (yarn(config), attention_factor as f32),
        };
        RopeTable { inv_freq, attention_factor }
    }

    /// cos and sin (each `[head_dim / 2]`) of one position, times the attention factor. The angle is an f32 product.
    ///
    /// # Panics
    /// If `cos` or `sin` has another length than `inv_freq`.
    pub fn angles(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        assert_eq!(cos.len(), self.inv_freq.len(), "angles: length of cos");
        assert_eq!(sin.len(), self.inv_freq.len(), "angles: length of sin");
        for ((c, s), f) in cos.iter_mut().zip(sin).zip(&self.inv_freq) {
            let (sine, cosine) = (position as f32 * f).sin_cos();
            *c = cosine * self.attention_factor;
            *s = sine * self.attention_factor;
        }
    }
}

/// `theta ^ (2i / head_dim)`: the exponent is rounded to f32 first, as torch does, and the power once.
fn powers(config: &Config) -> impl Iterator<Item = f32> {
    let (theta, dim) = (config.rope.theta, config.head_dim);
    (0..dim / 2).map(move |i| theta.powf(f64::from((2 * i) as f32 / dim as f32)) as f32)
}

/// Long waves are divided by `factor`, short ones kept, those between interpolated.
fn llama3(scaling: &RopeScaling, inv_freq: f32) -> f32 {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } = *scaling else {
        return inv_freq;
    };
    let context = original_max_positions as f64;
    let wavelen = (2.0 * PI) as f32 / inv_freq;
    if wavelen < (context / high_freq_factor) as f32 {
        inv_freq
    } else if wavelen > (context / low_freq_factor) as f32 {
        inv_freq / factor as f32
    } else {
        let smooth = (context as f32 / wavelen - low_freq_factor as f32) / (high_freq_factor - low_freq_factor) as f32;
        (1.0 - smooth) * inv_freq / factor as f32 + smooth * inv_freq
    }
}

/// Interpolates (divides by `factor`) the dimensions that turn less than `beta_slow` times in the original context,
/// keeps those that turn more than `beta_fast` times, with a linear ramp between.
fn yarn(config: &Config) -> Vec<f32> {
    let RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, truncate, .. } = config.rope.scaling
    else {
        return Vec::new();
    };
    let dim = config.head_dim as f64;
    let dim_of_turns =
        |turns: f64| dim * (original_max_positions as f64 / (turns * 2.0 * PI)).ln() / (2.0 * config.rope.theta.ln());
    let round = |low: f64, high: f64| if truncate { (low.floor(), high.ceil()) } else { (low, high) };
    let (low, high) = round(dim_of_turns(beta_fast), dim_of_turns(beta_slow));
    let (low, high) = (low.max(0.0), high.min(dim - 1.0));
    // As Hugging Face: equal ends would divide by zero.
    let high = if low == high { high + 0.001 } else { high };
    powers(config)
        .enumerate()
        .map(|(i, power)| {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let keep = 1.0 - ramp;
            1.0 / (factor as f32 * power) * (1.0 - keep) + 1.0 / power * keep
        })
        .collect()
}
