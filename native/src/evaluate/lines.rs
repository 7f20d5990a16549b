//! Lines in panels side by side, with their names beside them: figures against L0, or layer by layer.

use anyhow::{Context, Result, ensure};
use plotters::chart::ChartContext;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::plot::{GRID, INK};

const PANEL: (u32, u32) = (480, 400);
/// Width of the names beside the panels.
const LEGEND: u32 = 240;
/// Wong's colours for the colour-blind (Nature Methods 8, 441), without yellow, which is lost on white.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(51, 51, 51),
];
/// L0s named on the axis, as far as they lie in the plot.
const TICKS: [f64; 11] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0];

/// A line: its name, and its points from left to right.
pub type Line = (String, Vec<(f64, f64)>);

/// What lies to the right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Mean active latents, on a logarithmic axis.
    L0,
    /// Layers.
    Layer,
}

/// Panels side by side, each with a title for its values; those without a point are left out, as are lines without one. A name has
/// the same look in every panel.
///
/// # Errors
/// If there is no point at all, or drawing fails.
pub fn svg(axis: Axis, panels: &[(&str, Vec<Line>)]) -> Result<String> {
    let drawn = |lines: &[Line]| lines.iter().any(|(_, points)| !points.is_empty());
    let panels: Vec<_> = panels.iter().filter(|(_, lines)| drawn(lines)).collect();
    ensure!(!panels.is_empty(), "there is no figure to draw");
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in panels.iter().flat_map(|(_, lines)| lines).filter(|(_, points)| !points.is_empty()) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let mut svg = String::new();
    {
        let width = PANEL.0 * panels.len() as u32;
        let area = SVGBackend::with_string(&mut svg, (width + LEGEND, PANEL.1)).into_drawing_area();
        area.fill(&WHITE).context("cannot draw the plot")?;
        // The names stand beside the panels, where they cover nothing.
        let (drawn, beside) = area.split_horizontally(width);
        for (part, (title, lines)) in drawn.split_evenly((1, panels.len())).iter().zip(&panels) {
            panel(part, axis, title, lines, &names)?;
        }
        legend(&beside, &names)?;
        area.present().context("cannot finish the plot")?;
    }
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn panel(area: &Area<'_>, axis: Axis, title: &str, lines: &[Line], names: &[&str]) -> Result<()> {
    let points = || lines.iter().flat_map(|(_, points)| points);
    let left = points().map(|point| point.0).fold(f64::INFINITY, f64::min);
    let right = points().map(|point| point.0).fold(0.0, f64::max);
    let top = points().map(|point| point.1).fold(0.0, f64::max) * 1.08;
    let bottom = points().map(|point| point.1).fold(0.0, f64::min) * 1.08;
    let values = bottom..top.max(1e-9);
    let mut builder = ChartBuilder::on(area);
    builder.margin(16).x_label_area_size(44).y_label_area_size(64);
    let axes = "cannot draw the axes";
    match axis {
        Axis::L0 => {
            let (low, high) = (left / 1.15, right * 1.15);
            let ticks = TICKS.into_iter().filter(|tick| (low..high).contains(tick)).collect();
            let x = (low..high).log_scale().with_key_points(ticks);
            let chart = builder.build_cartesian_2d(x, values).context(axes)?;
            fill(chart, "L0, mean active latents a token", title, lines, names)
        }
        Axis::Layer => {
            let chart = builder.build_cartesian_2d(0.0..right.max(1.0), values).context(axes)?;
            fill(chart, "layer", title, lines, names)
        }
    }
}

/// Axes, lines and marks.
fn fill<X: Ranged<ValueType = f64> + ValueFormatter<f64>>(
    mut chart: ChartContext<'_, SVGBackend<'_>, Cartesian2d<X, RangedCoordf64>>,
    x_title: &str,
    title: &str,
    lines: &[Line],
    names: &[&str],
) -> Result<()> {
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style(("sans-serif", 13, &INK))
        .x_desc(x_title)
        .y_desc(title)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .draw()
        .context("cannot draw the axes")?;
    for (name, points) in lines.iter().filter(|(_, points)| !points.is_empty()) {
        let look = Look::of(names.iter().position(|known| known == name).unwrap_or(0));
        let line = points.iter().copied();
        if look.hollow {
            let dashes = DashedLineSeries::new(line, 6, 4, look.colour.stroke_width(2));
            chart.draw_series(dashes).context("cannot draw a line")?;
        } else {
            let whole = LineSeries::new(line, look.colour.stroke_width(2));
            chart.draw_series(whole).context("cannot draw a line")?;
        }
        let marks = points.iter().map(|&point| Circle::new(point, 4, look.mark()));
        chart.draw_series(marks).context("cannot draw the marks")?;
    }
    Ok(())
}

/// How a line is drawn: after as many as there are colours, dashed and hollow.
struct Look {
    colour: RGBColor,
    hollow: bool,
}

impl Look {
    fn of(number: usize) -> Self {
        Self { colour: COLOURS[number % COLOURS.len()], hollow: number >= COLOURS.len() }
    }

    fn mark(&self) -> ShapeStyle {
        if self.hollow { self.colour.stroke_width(2) } else { self.colour.filled() }
    }
}

/// The names, each with its line and mark.
fn legend(area: &Area<'_>, names: &[&str]) -> Result<()> {
    for (i, name) in names.iter().enumerate() {
        let (look, y) = (Look::of(i), 32 + 22 * i32::try_from(i)?);
        let pieces = if look.hollow { vec![(0, 8), (22, 30)] } else { vec![(0, 30)] };
        for (from, to) in pieces {
            let line = PathElement::new([(from, y), (to, y)], look.colour.stroke_width(2));
            area.draw(&line).context("cannot draw the legend")?;
        }
        area.draw(&Circle::new((15, y), 4, look.mark())).context("cannot draw the legend")?;
        let style = ("sans-serif", 13, &INK).into_text_style(area);
        area.draw(&Text::new((*name).to_owned(), (38, y - 7), style)).context("cannot draw the legend")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_and_lines_without_a_point_are_left_out() {
        let line = |name: &str, points: &[(f64, f64)]| (name.to_owned(), points.to_vec());
        let a = line("a", &[(1.0, 0.5), (2.0, 0.25)]);
        let panels = [("FVU", vec![a, line("b", &[])]), ("KL", vec![line("a", &[])])];
        for axis in [Axis::L0, Axis::Layer] {
            let svg = svg(axis, &panels).unwrap();
            assert!(svg.contains("FVU") && !svg.contains("KL") && !svg.contains(">\nb\n"));
            assert_eq!(svg.matches("<circle").count(), 2 + 1, "two marks, and one beside the name");
        }
        assert!(svg(Axis::Layer, &[("KL", vec![])]).is_err());
    }
}
