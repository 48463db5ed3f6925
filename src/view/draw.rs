//! A run on a screen of any size.

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::Line;
use ratatui::widgets::{Axis, Block, Chart, Dataset, Gauge, GraphType, Paragraph, Widget};
use ratatui::Frame;
use unicode_width::UnicodeWidthStr;

use super::live::{Live, Rank};
use super::runs::{fit, printable};
use crate::run::progress::span;
use crate::run::survey::State;
use crate::watch::Phase;

/// From this width on, the ranks have a column of their own.
const WIDE: u16 = 100;
const RANKS_WIDTH: u16 = 44;

/// A chart that is lower, with its border, shows nothing.
const CHART_HEIGHT: u16 = 6;

/// Seconds without a new row that are worth a word.
const QUIET_S: u64 = 10;

/// Draws the run.
pub fn draw(frame: &mut Frame, live: &Live) {
    render(live, frame.area(), frame.buffer_mut());
}

/// The picture as text.
pub fn snapshot(live: &Live, width: u16, height: u16) -> String {
    let area = Rect::new(0, 0, width, height);
    let mut buffer = Buffer::empty(area);
    render(live, area, &mut buffer);
    let line = |y: u16| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    (0..height).map(|y| line(y).trim_end().to_owned() + "\n").collect()
}

fn render(live: &Live, area: Rect, buffer: &mut Buffer) {
    let width = area.width.into();
    let numbers = wrapped(&numbers(live), width);
    let heights = [1, 1, numbers.len() as u16];
    let [head, gauge, facts, body, foot] = Layout::vertical([
        Constraint::Length(heights[0]),
        Constraint::Length(heights[1]),
        Constraint::Length(heights[2]),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(area);
    Paragraph::new(Line::styled(fit(&title(live), width), Modifier::BOLD)).render(head, buffer);
    progress(live, gauge, buffer);
    Paragraph::new(numbers.join("\n")).render(facts, buffer);
    let trouble = live.trouble.as_deref().map(printable);
    let foot_text = trouble.as_deref().unwrap_or("q leaves; the run goes on");
    let style = if trouble.is_some() { Color::Red.into() } else { Style::from(Modifier::DIM) };
    Paragraph::new(Line::styled(fit(foot_text, width), style)).render(foot, buffer);
    if area.width >= WIDE {
        let [left, right] = Layout::horizontal([Constraint::Fill(1), Constraint::Length(RANKS_WIDTH)]).areas(body);
        charts(live, left, buffer);
        ranks(live, right, buffer);
    } else {
        let most = (body.height / 4).max(3);
        let height = if live.ranks.is_empty() { 0 } else { (live.ranks.len() as u16).saturating_add(2).min(most) };
        let [top, bottom] = Layout::vertical([Constraint::Fill(1), Constraint::Length(height)]).areas(body);
        charts(live, top, buffer);
        ranks(live, bottom, buffer);
    }
}

fn title(live: &Live) -> String {
    let state = live.state.map_or("looking whether it goes on", State::name);
    let quiet = live.now.saturating_duration_since(live.progressed).as_secs();
    let quiet = match live.state {
        Some(State::Running) if quiet >= QUIET_S => format!(", no new row for {}", span(quiet as f64)),
        _ => String::new(),
    };
    let restarts = match live.survey.restarts {
        0 => String::new(),
        1 => ", 1 restart".into(),
        n => format!(", {n} restarts"),
    };
    format!("{}: {state}{restarts}{quiet}", printable(&live.dir.0.display().to_string()))
}

/// How far it is, and how long it takes.
fn progress(live: &Live, area: Rect, buffer: &mut Buffer) {
    let step = live.step();
    let Some(steps) = live.survey.steps else {
        return Paragraph::new(format!("step {step}")).render(area, buffer);
    };
    let done = (step as f64 / steps.max(1) as f64).min(1.0);
    let left = live.left_s().map_or(String::new(), |left| format!(", {} left", span(left)));
    let label = format!("step {step} of {steps}{left}");
    Gauge::default().ratio(done).label(label).gauge_style(Style::from(Color::Cyan)).render(area, buffer);
}

/// The newest numbers.
fn numbers(live: &Live) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(row) = live.recent.back() {
        found.push(format!("loss {:.4}", row.loss));
    }
    if let Some((_, loss)) = live.valid.last() {
        found.push(format!("valid {loss:.4}"));
    }
    let best = live.valid.iter().filter(|(_, loss)| loss.is_finite()).min_by(|a, b| a.1.total_cmp(&b.1));
    if let Some((step, loss)) = best {
        found.push(format!("best ppl {:.2} at step {step}", loss.exp()));
    }
    if let Some(row) = live.recent.back() {
        found.push(format!("{:.0} tokens/s", row.tokens_per_s));
        found.push(format!("{:.0} ms a step", row.step_ms));
        found.push(format!("lr {:.2e}", row.lr));
        found.push(format!("grad norm {:.3}", row.grad_norm));
        found.extend(row.mfu.map(|mfu| format!("MFU {:.0} %", 100.0 * mfu)));
        found.extend(row.memory_mib.map(|mib| format!("{mib:.0} MiB")));
        found.push(format!("trained {}", span(row.elapsed_s)));
    }
    found
}

/// Items in lines that are no wider than this.
fn wrapped(items: &[String], width: usize) -> Vec<String> {
    const BETWEEN: &str = "   ";
    let mut lines: Vec<String> = Vec::new();
    for item in items {
        match lines.last_mut() {
            Some(line) if line.width() + BETWEEN.len() + item.width() <= width => *line += &format!("{BETWEEN}{item}"),
            _ => lines.push(fit(item, width)),
        }
    }
    lines
}

fn charts(live: &Live, area: Rect, buffer: &mut Buffer) {
    let both = area.height >= 2 * CHART_HEIGHT;
    let speed_height = if both { (area.height / 3).max(CHART_HEIGHT) } else { 0 };
    let [top, bottom] = Layout::vertical([Constraint::Fill(1), Constraint::Length(speed_height)]).areas(area);
    let title = if live.valid.is_empty() { "training loss" } else { "loss: training, and validation as o" };
    chart(title, &live.loss, &live.valid, false, top, buffer);
    if both {
        chart("tokens/s", &live.speed, &[], true, bottom, buffer);
    }
}

/// A curve against steps, and points beside it.
fn chart(title: &str, curve: &[(f64, f64)], points: &[(f64, f64)], from_zero: bool, area: Rect, buffer: &mut Buffer) {
    let block = Block::bordered().title(fit(title, area.width.saturating_sub(2).into()));
    let curve = thinned(curve, 2 * usize::from(area.width));
    let points: Vec<(f64, f64)> = points.iter().copied().filter(|(_, y)| y.is_finite()).collect();
    let (Some(first), Some(last)) = (curve.first(), curve.last()) else {
        return Paragraph::new("no step is done yet").block(block).render(area, buffer);
    };
    let (low, high) = bounds(&curve, &points, from_zero);
    let clipped = |points: Vec<(f64, f64)>| -> Vec<(f64, f64)> {
        points.into_iter().map(|(x, y)| (x, y.clamp(low, high))).collect()
    };
    let (from, to) = (first.0, last.0.max(first.0 + 1.0));
    let (curve, points) = (clipped(curve), clipped(points));
    let label = |number: f64| if from_zero { format!("{number:.0}") } else { format!("{number:.2}") };
    let line = Dataset::default().marker(Marker::Braille).graph_type(GraphType::Line).style(Color::Cyan).data(&curve);
    let dots = Dataset::default()
        .marker(Marker::Custom('o'))
        .graph_type(GraphType::Scatter)
        .style(Color::Yellow)
        .data(&points);
    let y = Axis::default().bounds([low, high]).labels([label(low), label((low + high) / 2.0), label(high)]);
    let x = Axis::default().bounds([from, to]).labels([format!("{from}"), format!("{to}")]);
    Chart::new(vec![line, dots]).block(block).x_axis(x).y_axis(y).legend_position(None).render(area, buffer);
}

/// As many points as can be seen: each the mean of its neighbours. Values that are not finite are left out.
fn thinned(curve: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = curve.iter().copied().filter(|(_, y)| y.is_finite()).collect();
    let mean = |part: &[(f64, f64)]| {
        let sum = part.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / part.len() as f64, sum.1 / part.len() as f64)
    };
    let mut few: Vec<(f64, f64)> = finite.chunks(finite.len().div_ceil(most.max(1)).max(1)).map(mean).collect();
    // The axis ends where the curve does.
    if let (Some(first), Some(last)) = (finite.first(), finite.last()) {
        let end = few.len() - 1;
        few[0].0 = first.0;
        few[end].0 = last.0;
    }
    few
}

/// What of the values is shown: all but the highest few, which are those of the first steps.
fn bounds(curve: &[(f64, f64)], points: &[(f64, f64)], from_zero: bool) -> (f64, f64) {
    let mut values: Vec<f64> = curve.iter().map(|point| point.1).collect();
    values.sort_by(f64::total_cmp);
    let most = values[(values.len() - 1) * 98 / 100];
    let shown = points.iter().map(|point| point.1);
    let low = if from_zero { 0.0 } else { shown.clone().fold(values[0], f64::min) };
    let high = if from_zero { most * 1.1 } else { shown.fold(most, f64::max) };
    if high > low { (low, high) } else { (low, low + 1.0) }
}

fn ranks(live: &Live, area: Rect, buffer: &mut Buffer) {
    if area.is_empty() {
        return;
    }
    let block = Block::bordered().title(fit("ranks", area.width.saturating_sub(2).into()));
    let inner = block.inner(area);
    block.render(area, buffer);
    let mut all: Vec<(&usize, &Rank)> = live.ranks.iter().collect();
    // Those that the others wait for come first: silent ones, then those that are behind.
    all.sort_by_key(|(rank, known)| (live.silence(known).is_none(), known.last.step, **rank));
    let room = usize::from(inner.height);
    let shown = if all.len() > room { room.saturating_sub(1) } else { all.len() };
    let line = |(rank, known): &(&usize, &Rank)| {
        let Rank { last, .. } = known;
        let (host, doing, step) = (printable(&last.host), last.phase.name(), last.step);
        match live.silence(known) {
            Some(silence) => {
                let text = format!("{rank} {host}: silent for {}, {doing}, step {step}", span(silence.as_secs_f64()));
                Line::styled(fit(&text, inner.width.into()), Style::from(Color::Red).add_modifier(Modifier::BOLD))
            }
            None => {
                let doing = if live.state == Some(State::Running) { doing } else { Phase::End.name() };
                let since = if last.phase_s >= QUIET_S { format!(" for {}", span(last.phase_s as f64)) } else { String::new() };
                Line::from(fit(&format!("{rank} {host}: step {step}, {doing}{since}"), inner.width.into()))
            }
        }
    };
    let mut lines: Vec<Line> = all[..shown].iter().map(line).collect();
    if shown < all.len() {
        lines.push(Line::from(fit(&format!("and {} more ranks", all.len() - shown), inner.width.into())));
    }
    Paragraph::new(lines).render(inner, buffer);
}
