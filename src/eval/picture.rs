//! Results as pictures: heat maps for a terminal and as SVG, bars as SVG.

use std::fmt::Write;

const TEXT: &str = "#222";
const FAINT: &str = "#777";

/// One heat map: what a KV mode scores at each depth and length.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    /// Its heading.
    pub title: String,
    /// `[rows][columns]`, from 0 to 1; `None`: not measured.
    pub cells: Vec<Vec<Option<f64>>>,
}

/// Heat maps with one set of axes.
#[derive(Clone, Debug, PartialEq)]
pub struct Heatmap {
    /// Above all of them.
    pub title: String,
    /// What a row is.
    pub row_axis: String,
    /// Names of the rows, from the top.
    pub rows: Vec<String>,
    /// What a column is.
    pub column_axis: String,
    /// Names of the columns.
    pub columns: Vec<String>,
    /// One for each mode.
    pub panels: Vec<Panel>,
}

/// From red (0) over yellow (0.5) to green (1), in straight lines between these three. Numbers stand in the cells, too.
fn colour(x: f64) -> [u8; 3] {
    const STOPS: [[f64; 3]; 3] = [[215.0, 48.0, 39.0], [254.0, 224.0, 139.0], [26.0, 152.0, 80.0]];
    let at = x.clamp(0.0, 1.0) * 2.0;
    let (i, t) = if at < 1.0 { (0, at) } else { (1, at - 1.0) };
    std::array::from_fn(|c| (STOPS[i][c] + (STOPS[i + 1][c] - STOPS[i][c]) * t).round() as u8)
}

/// `1`, `.97`, `0`: at most two digits, and 1 only for what is exactly 1.
fn brief(x: Option<f64>) -> String {
    match x {
        None => "-".into(),
        Some(x) if x >= 1.0 => "1".into(),
        Some(x) if x <= 0.0 => "0".into(),
        Some(x) => format!("{:.2}", (x.clamp(0.01, 0.99) * 100.0).round() / 100.0).trim_start_matches('0').into(),
    }
}

impl Heatmap {
    /// Lines for a terminal, in colour (24 bit) or plain.
    pub fn text(&self, coloured: bool) -> String {
        let width = self.columns.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(3) + 2;
        let margin = self.rows.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(5);
        let mut out = String::new();
        for panel in &self.panels {
            let _ = writeln!(out, "{}  ({} down, {} across)", panel.title, self.row_axis, self.column_axis);
            let _ = write!(out, "{:>margin$} ", "");
            self.columns.iter().for_each(|name| out.push_str(&format!("{name:^width$}")));
            out.truncate(out.trim_end_matches(' ').len());
            out.push('\n');
            for (name, cells) in self.rows.iter().zip(&panel.cells) {
                let _ = write!(out, "{name:>margin$} ");
                for &cell in cells {
                    let text = format!("{:^width$}", brief(cell));
                    match cell.filter(|_| coloured) {
                        Some(x) => {
                            let [r, g, b] = colour(x);
                            let _ = write!(out, "\x1b[30;48;2;{r};{g};{b}m{text}\x1b[0m");
                        }
                        None => out.push_str(&text),
                    }
                }
                out.truncate(out.trim_end_matches(' ').len());
                out.push('\n');
            }
            out.push('\n');
        }
        out
    }

    /// The picture, at most three maps side by side.
    pub fn svg(&self) -> String {
        const ROW: f64 = 24.0;
        const MARGIN: (f64, f64) = (86.0, 34.0);
        let per_row = self.panels.len().clamp(1, 3);
        // Columns as wide as the headings above them ask for, within reason.
        let heading = self.panels.iter().map(|panel| panel.title.chars().count()).max().unwrap_or(0) as f64 * 7.0;
        let column = (heading / self.columns.len().max(1) as f64).clamp(46.0, 90.0);
        let (width, height) = (self.columns.len() as f64 * column, self.rows.len() as f64 * ROW);
        // The name of the rows is written upwards, and may be longer than there are rows.
        let tall = height.max(self.row_axis.chars().count() as f64 * 6.0);
        let panel = (MARGIN.0 + width.max(heading) + 16.0, MARGIN.1 + tall + 44.0);
        let size =
            ((per_row as f64 * panel.0 + 16.0).max(480.0), 74.0 + self.panels.len().div_ceil(per_row) as f64 * panel.1);
        let mut svg = Svg::new(size.0, size.1, &self.title);
        scale(&mut svg, 16.0, 40.0);
        for (i, map) in self.panels.iter().enumerate() {
            let left = 8.0 + (i % per_row) as f64 * panel.0 + MARGIN.0;
            let top = 74.0 + (i / per_row) as f64 * panel.1 + MARGIN.1;
            svg.text(left, top - 12.0, 12.0, "start", TEXT, true, &map.title);
            for (r, (name, cells)) in self.rows.iter().zip(&map.cells).enumerate() {
                let y = top + r as f64 * ROW;
                svg.text(left - 6.0, y + 16.0, 11.0, "end", TEXT, false, name);
                for (c, &cell) in cells.iter().enumerate() {
                    let x = left + c as f64 * column;
                    let fill = cell.map_or("#eee".into(), |x| {
                        let [r, g, b] = colour(x);
                        format!("#{r:02x}{g:02x}{b:02x}")
                    });
                    svg.rect(x, y, column - 1.0, ROW - 1.0, &fill);
                    // Dark on the light middle, light on the dark ends.
                    let ink = if cell.is_some_and(|x| !(0.2..0.85).contains(&x)) { "white" } else { TEXT };
                    svg.text(x + column / 2.0, y + 16.0, 11.0, "middle", ink, false, &brief(cell));
                }
            }
            for (c, name) in self.columns.iter().enumerate() {
                let x = left + (c as f64 + 0.5) * column;
                svg.text(x, top + height + 14.0, 11.0, "middle", TEXT, false, name);
            }
            svg.text(left + width / 2.0, top + height + 30.0, 11.0, "middle", FAINT, false, &self.column_axis);
            svg.upright(left - 68.0, top + tall / 2.0, &self.row_axis);
        }
        svg.end()
    }
}

/// What the colours mean.
fn scale(svg: &mut Svg, x: f64, y: f64) {
    const STEPS: usize = 21;
    for i in 0..STEPS {
        let [r, g, b] = colour(i as f64 / (STEPS - 1) as f64);
        svg.rect(x + 20.0 + 8.0 * i as f64, y, 8.5, 12.0, &format!("#{r:02x}{g:02x}{b:02x}"));
    }
    svg.text(x + 12.0, y + 10.0, 11.0, "middle", FAINT, false, "0");
    svg.text(x + 28.0 + 8.0 * STEPS as f64, y + 10.0, 11.0, "middle", FAINT, false, "1");
}

/// Rows of bars: a group for each thing, a bar for each series.
#[derive(Clone, Debug, PartialEq)]
pub struct Bars {
    /// Above it.
    pub title: String,
    /// What the lengths mean.
    pub axis: String,
    /// Equal factors are equally long.
    pub logarithmic: bool,
    /// Names of the series.
    pub series: Vec<String>,
    /// Name of each group, and a value for each series; `None`: not measured.
    pub groups: Vec<(String, Vec<Option<f64>>)>,
}

const SERIES: [&str; 8] = ["#3f6ea3", "#d2802f", "#4f9a4a", "#8a66ad", "#c05a5a", "#7f7f7f", "#b59b2b", "#4aa3a3"];

impl Bars {
    /// The picture.
    pub fn svg(&self) -> String {
        const BAR: f64 = 15.0;
        const WIDTH: f64 = 860.0;
        let name = self.groups.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let left = 24.0 + 7.0 * name as f64;
        let group = self.series.len() as f64 * BAR + 12.0;
        let legend = self.series.len() as f64 * 18.0;
        let top = 40.0 + legend + 14.0;
        let height = top + self.groups.len() as f64 * group + 44.0;
        let mut svg = Svg::new(WIDTH, height, &self.title);
        for (i, name) in self.series.iter().enumerate() {
            let y = 38.0 + i as f64 * 18.0;
            svg.rect(16.0, y, 12.0, 12.0, SERIES[i % SERIES.len()]);
            svg.text(34.0, y + 10.0, 12.0, "start", TEXT, false, name);
        }
        let (from, to) = self.range();
        let room = WIDTH - left - 84.0;
        let length = |x: f64| match self.logarithmic {
            true => (x.max(from) / from).log10() / (to / from).log10() * room,
            false => (x - from) / (to - from) * room,
        };
        for tick in self.ticks(from, to) {
            let x = left + length(tick);
            svg.line(x, top - 4.0, height - 40.0);
            svg.text(x, height - 26.0, 10.0, "middle", FAINT, false, &short(tick));
        }
        svg.text(left + room / 2.0, height - 8.0, 11.0, "middle", FAINT, false, &self.axis);
        for (g, (name, values)) in self.groups.iter().enumerate() {
            let y = top + g as f64 * group;
            svg.text(left - 8.0, y + group / 2.0 - 2.0, 12.0, "end", TEXT, false, name);
            for (s, &value) in values.iter().enumerate() {
                let y = y + s as f64 * BAR;
                let bar = value.map_or(0.0, length).max(0.0);
                svg.rect(left, y, bar, BAR - 2.0, SERIES[s % SERIES.len()]);
                let label = value.map_or("n/a".into(), short);
                svg.text(left + bar + 4.0, y + 10.5, 10.0, "start", TEXT, false, &label);
            }
        }
        svg.end()
    }

    /// The ends of the axis: round, and around all values.
    fn range(&self) -> (f64, f64) {
        let values = self.groups.iter().flat_map(|(_, values)| values.iter().flatten().copied());
        let values: Vec<f64> = values.filter(|x| x.is_finite()).collect();
        let most = values.iter().copied().fold(0.0, f64::max);
        if !self.logarithmic {
            let step = step(most.max(1e-12));
            return (0.0, ((most / step).ceil() * step).max(step));
        }
        let least = values.iter().copied().filter(|&x| x > 0.0).fold(f64::INFINITY, f64::min);
        if !least.is_finite() {
            return (0.1, 1.0);
        }
        // Not more than eight powers of ten: what is below is as good as nothing.
        let top = most.log10().ceil();
        let bottom = least.log10().floor().max(top - 8.0).min(top - 1.0);
        (10f64.powf(bottom), 10f64.powf(top))
    }

    fn ticks(&self, from: f64, to: f64) -> Vec<f64> {
        if self.logarithmic {
            let powers = from.log10().round() as i32..=to.log10().round() as i32;
            return powers.map(|power| 10f64.powi(power)).collect();
        }
        let step = step(to);
        (0..=(to / step).round() as usize).map(|i| i as f64 * step).collect()
    }
}

/// A round step that divides `most` into four to ten.
fn step(most: f64) -> f64 {
    let power = 10f64.powf(most.log10().floor() - 1.0);
    [1.0, 2.0, 5.0, 10.0, 20.0].into_iter().map(|m| m * power).find(|s| most / s <= 10.0).unwrap_or(power * 20.0)
}

/// Three digits that matter.
fn short(x: f64) -> String {
    match x.abs() {
        0.0 => "0".into(),
        a if a < 1e-3 => format!("{x:.1e}"),
        a if a < 1.0 => {
            let digits = (2 - a.log10().floor() as i32).max(1) as usize;
            let text = format!("{x:.digits$}");
            text.trim_end_matches('0').trim_end_matches('.').into()
        }
        a if a < 100.0 => {
            let text = format!("{x:.2}");
            text.trim_end_matches('0').trim_end_matches('.').into()
        }
        _ => format!("{x:.0}"),
    }
}

struct Svg(String);

impl Svg {
    fn new(width: f64, height: f64, title: &str) -> Svg {
        let mut svg = Svg(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" viewBox=\"0 0 {width:.0} \
             {height:.0}\" font-family=\"sans-serif\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        ));
        // A heading that is too long is written smaller.
        let size = (14.0f64).min((width - 32.0) / (0.6 * title.chars().count().max(1) as f64));
        svg.text(16.0, 24.0, size, "start", TEXT, true, title);
        svg
    }

    fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, fill: &str) {
        let _ = writeln!(
            self.0,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{fill}\"/>"
        );
    }

    fn line(&mut self, x: f64, from: f64, to: f64) {
        let _ = writeln!(self.0, "<line x1=\"{x:.1}\" y1=\"{from:.1}\" x2=\"{x:.1}\" y2=\"{to:.1}\" stroke=\"#ddd\"/>");
    }

    #[allow(clippy::too_many_arguments)] // Each names itself where it is used.
    fn text(&mut self, x: f64, y: f64, size: f64, anchor: &str, fill: &str, bold: bool, text: &str) {
        let weight = if bold { " font-weight=\"bold\"" } else { "" };
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size:.1}\" text-anchor=\"{anchor}\" fill=\"{fill}\"{weight}>{}</text>",
            escaped(text)
        );
    }

    /// Text from below to above.
    fn upright(&mut self, x: f64, y: f64, text: &str) {
        let _ = writeln!(
            self.0,
            "<text transform=\"translate({x:.1} {y:.1}) rotate(-90)\" font-size=\"11.0\" text-anchor=\"middle\" \
             fill=\"{FAINT}\">{}</text>",
            escaped(text)
        );
    }

    fn end(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> Heatmap {
        Heatmap {
            title: "a < b & c".into(),
            row_axis: "depth".into(),
            rows: vec!["0 %".into(), "100 %".into()],
            column_axis: "tokens".into(),
            columns: vec!["500".into(), "1000".into()],
            panels: vec![Panel {
                title: "full".into(),
                cells: vec![vec![Some(1.0), Some(0.996)], vec![Some(0.0), None]],
            }],
        }
    }

    #[test]
    fn a_map_in_plain_text() {
        let expected = "full  (depth down, tokens across)\n       500   1000\n  0 %   1    .99\n100 %   0     -\n\n";
        assert_eq!(map().text(false), expected);
        assert_eq!(map().text(true).matches("\x1b[30;48;2;").count(), 3);
    }

    #[test]
    fn only_what_is_whole_is_called_whole() {
        for (x, text) in [(1.0, "1"), (0.999, ".99"), (0.5, ".50"), (0.001, ".01"), (0.0, "0")] {
            assert_eq!(brief(Some(x)), text);
        }
    }

    #[test]
    fn pictures_are_well_formed() {
        let bars = Bars {
            title: "t".into(),
            axis: "nats".into(),
            logarithmic: true,
            series: vec!["mean".into(), "p99".into()],
            groups: vec![("kivi".into(), vec![Some(0.02), None]), ("specache".into(), vec![Some(0.0), Some(3.0)])],
        };
        for svg in [map().svg(), bars.svg(), Bars { logarithmic: false, ..bars.clone() }.svg()] {
            assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
            assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
        assert!(map().svg().contains("a &lt; b &amp; c"));
        assert_eq!(bars.range(), (0.01, 10.0));
    }

    /// Of maps one above the other with one row each, the names of the rows stay apart, and clear of the title.
    #[test]
    fn names_of_rows_do_not_overlap() {
        let panel = Panel { title: "full".into(), cells: vec![vec![Some(1.0)]] };
        let row_axis = "depth of the needle".to_string();
        let length = row_axis.len() as f64 * 6.0;
        let svg = Heatmap { row_axis, rows: vec!["50 %".into()], panels: vec![panel; 4], ..map() }.svg();
        let middles = svg.split("translate(").skip(1).map(|at| {
            let (x, y) = at.split_once(')').unwrap().0.split_once(' ').unwrap();
            (x.parse::<f64>().unwrap(), y.parse::<f64>().unwrap())
        });
        let middles: Vec<(f64, f64)> = middles.collect();
        assert!(middles.len() == 4 && middles[0].1 - length / 2.0 > 74.0, "{middles:?}");
        assert!(middles[0].0 == middles[3].0 && middles[3].1 - middles[0].1 > length, "{middles:?}");
    }

    #[test]
    fn axes_have_round_steps() {
        for (most, expected) in [(1.0, 0.1), (0.97, 0.1), (0.4, 0.05), (37.0, 5.0), (0.0123, 0.002)] {
            assert!((step(most) / expected - 1.0).abs() < 1e-9, "{most}: {}", step(most));
        }
        assert_eq!([0.5, 0.0123, 12.3, 1234.0, 1e-5].map(short), ["0.5", "0.0123", "12.3", "1234", "1.0e-5"]);
    }
}
