//! A picture of what the streams did in a step: one panel a schedule, one row a stream, as SVG.

use std::collections::BTreeSet;
use std::fmt::Write;

use specache::device::order::StreamId;
use specache::device::trace::{Slice, streams};

const WIDTH: f64 = 1200.0;
/// Left of the rows: their names.
const MARGIN: f64 = 80.0;
const ROW: f64 = 24.0;
const GAP: f64 = 6.0;
const TITLE: f64 = 30.0;
const AXIS: f64 = 34.0;
const LEGEND: f64 = 28.0;
/// What a character of the heading takes, on the wide side.
const WIDEST: f64 = 9.0;

/// One schedule's step.
pub struct Panel {
    pub title: String,
    /// Everything that overlaps the step.
    pub slices: Vec<Slice>,
    /// Begin and end of the step, microseconds as in the slices.
    pub begin_us: f64,
    pub end_us: f64,
}

/// What a time is spent on: a colour of the picture, a column of the table. The streams' are called as their rows are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Attention,
    Dense,
    Ends,
    Exposed,
    Gather,
    CopyIn,
    CopyOut,
}

impl Kind {
    pub const ALL: [Kind; 7] =
        [Kind::Attention, Kind::Dense, Kind::Ends, Kind::Exposed, Kind::Gather, Kind::CopyIn, Kind::CopyOut];

    pub fn of(slice: &Slice) -> Kind {
        match (slice.stream, slice.name) {
            _ if slice.waits => Kind::Exposed,
            (StreamId::Gather, _) => Kind::Gather,
            (StreamId::CopyIn, _) => Kind::CopyIn,
            (StreamId::CopyOut, _) => Kind::CopyOut,
            (_, "out_residual" | "norm_gate_up" | "down_residual") => Kind::Dense,
            (_, "embed" | "norm_logits") => Kind::Ends,
            _ => Kind::Attention,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Kind::Attention => "attention",
            Kind::Dense => "projections and MLP",
            Kind::Ends => "embedding and LM head",
            Kind::Exposed => "exposed wait",
            Kind::Gather => StreamId::Gather.name(),
            Kind::CopyIn => StreamId::CopyIn.name(),
            Kind::CopyOut => StreamId::CopyOut.name(),
        }
    }

    fn colour(self) -> &'static str {
        match self {
            Kind::Attention => "#3f6ea3",
            Kind::Dense => "#9db8d4",
            Kind::Ends => "#c9c9c9",
            Kind::Exposed => "#d2302f",
            Kind::Gather => "#e6a532",
            Kind::CopyIn => "#4f9a4a",
            Kind::CopyOut => "#8a66ad",
        }
    }
}

/// The whole picture. All panels share one scale.
pub fn svg(heading: &str, panels: &[Panel]) -> String {
    let rows: BTreeSet<StreamId> = panels.iter().flat_map(|panel| streams(&panel.slices)).collect();
    let rows: Vec<StreamId> = rows.into_iter().collect();
    let panel_height = TITLE + rows.len() as f64 * (ROW + GAP) + AXIS;
    let height = LEGEND + TITLE + panels.len() as f64 * panel_height;
    let longest = panels.iter().map(|p| p.end_us - p.begin_us).fold(0.0, f64::max);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height:.0}\" viewBox=\"0 0 {WIDTH} {height:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    // A heading that is too long is written narrower, rather than over the edge.
    let room = WIDTH - 16.0;
    let fit = if heading.chars().count() as f64 * WIDEST > room {
        format!(" textLength=\"{room}\" lengthAdjust=\"spacingAndGlyphs\"")
    } else {
        String::new()
    };
    let _ =
        writeln!(out, "<text x=\"8\" y=\"20\" font-size=\"14\" font-weight=\"bold\"{fit}>{}</text>", escaped(heading));
    legend(&mut out, TITLE);
    for (i, panel) in panels.iter().enumerate() {
        draw(&mut out, panel, &rows, LEGEND + TITLE + i as f64 * panel_height, longest);
    }
    out + "</svg>\n"
}

fn legend(out: &mut String, y: f64) {
    let mut x = 8.0;
    for (name, colour) in Kind::ALL.map(|kind| (kind.name(), kind.colour())) {
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{}\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{}\" y=\"{}\">{name}</text>",
            y + 6.0,
            x + 16.0,
            y + 16.0
        );
        x += 34.0 + 7.0 * name.len() as f64;
    }
}

fn draw(out: &mut String, panel: &Panel, rows: &[StreamId], top: f64, longest: f64) {
    let scale = (WIDTH - MARGIN - 16.0) / longest;
    let x = |us: f64| MARGIN + (us - panel.begin_us) * scale;
    let _ = writeln!(out, "<text x=\"8\" y=\"{}\" font-weight=\"bold\">{}</text>", top + 20.0, escaped(&panel.title));
    let row = |stream| rows.iter().position(|&s| s == stream).expect("the rows are those of the slices");
    let y = |stream| top + TITLE + row(stream) as f64 * (ROW + GAP);
    for &stream in rows {
        let (y, end) = (y(stream), x(panel.end_us));
        let _ = writeln!(
            out,
            "<text x=\"8\" y=\"{}\">{}</text><rect x=\"{MARGIN}\" y=\"{y}\" width=\"{:.1}\" height=\"{ROW}\" fill=\"#f3f3f3\"/>",
            y + 16.0,
            stream.name(),
            end - MARGIN
        );
    }
    for slice in &panel.slices {
        let (from, to) = (x(slice.begin_us.max(panel.begin_us)), x(slice.end_us.min(panel.end_us)));
        let layer = slice.place.layer.map_or("no layer".to_string(), |l| format!("layer {l}"));
        let wait = if slice.waits { "wait: " } else { "" };
        let (y, width) = (y(slice.stream), (to - from).max(0.4));
        let _ = writeln!(
            out,
            "<rect x=\"{from:.2}\" y=\"{y}\" width=\"{width:.2}\" height=\"{ROW}\" fill=\"{}\"><title>{wait}{}, step {}, {layer}: \
             {:.1} us</title></rect>",
            Kind::of(slice).colour(),
            slice.name,
            slice.place.step,
            slice.us()
        );
        // A number where the slice begins its layer and there is room for it.
        let numbered = matches!(slice.name, "norm_qkv_rope" | "gather" | "prefetch") && !slice.waits;
        if let (Some(layer), true) = (slice.place.layer, numbered && width > 9.0) {
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{}\" font-size=\"9\" fill=\"white\">{layer}</text>",
                from + 1.5,
                y + 15.0
            );
        }
    }
    axis(out, panel, top + TITLE + rows.len() as f64 * (ROW + GAP), scale);
}

/// Ticks at round times.
fn axis(out: &mut String, panel: &Panel, y: f64, scale: f64) {
    let length = panel.end_us - panel.begin_us;
    let step = tick(100.0 / scale);
    let mut at = 0.0;
    while at <= length {
        let x = MARGIN + at * scale;
        // At the right edge to the left of its tick.
        let anchor = if x > WIDTH - 60.0 { "end" } else { "start" };
        let label = if step >= 1000.0 { format!("{} ms", at / 1e3) } else { format!("{at} us") };
        let _ = writeln!(
            out,
            "<line x1=\"{x:.1}\" y1=\"{y}\" x2=\"{x:.1}\" y2=\"{}\" stroke=\"#888\"/><text x=\"{x:.1}\" y=\"{}\" font-size=\"10\" \
             text-anchor=\"{anchor}\" fill=\"#555\">{label}</text>",
            y + 4.0,
            y + 15.0
        );
        at += step;
    }
}

/// The least of 1, 2, 5 times a power of ten that is at least `us`.
fn tick(us: f64) -> f64 {
    let power = 10f64.powf(us.max(1e-3).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|&t| t >= us).unwrap_or(10.0 * power)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_heading_stays_inside() {
        assert!(svg(&"a long name ".repeat(20), &[]).contains("textLength=\"1184\""));
        assert!(!svg("a short one", &[]).contains("textLength"));
    }

    #[test]
    fn ticks_are_round() {
        for (us, expected) in [(0.9, 1.0), (1.0, 1.0), (1.1, 2.0), (30.0, 50.0), (51.0, 100.0), (700.0, 1000.0)] {
            assert_eq!(tick(us), expected, "{us}");
        }
    }
}
