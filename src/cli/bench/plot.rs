//! A picture of how fast each mode decodes.

use specache::eval::picture::Bars;
use specache::kv::KvMode;

use super::decode::ModelResult;
use super::report::mean;

/// Bars of tokens a second: a group for each model, depth and batch, a colour for each mode.
pub fn svg(results: &[ModelResult]) -> String {
    let modes: Vec<KvMode> =
        KvMode::ALL.into_iter().filter(|&m| results.iter().any(|r| r.modes.iter().any(|x| x.kv.mode == m))).collect();
    let group = |result: &ModelResult| {
        let batch = if result.batch > 1 { format!(", batch {}", result.batch) } else { String::new() };
        let speed = |mode: &KvMode| result.modes.iter().find(|x| x.kv.mode == *mode).map(|x| mean(&x.tok_s));
        (format!("{}, {} tokens{batch}", result.model, result.depth), modes.iter().map(speed).collect())
    };
    let speeds = || results.iter().flat_map(|result| &result.modes).map(|mode| mean(&mode.tok_s));
    let (slowest, fastest) = (speeds().fold(f64::INFINITY, f64::min), speeds().fold(0.0, f64::max));
    Bars {
        title: "Decoding speed by KV mode".into(),
        axis: "tokens a second, all sequences together".into(),
        // Models of very different sizes would not be seen beside each other.
        logarithmic: fastest > 30.0 * slowest,
        series: modes.iter().map(|mode| mode.name().to_string()).collect(),
        groups: results.iter().map(group).collect(),
    }
    .svg()
}
