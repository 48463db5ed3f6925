//! A run on a screen of any size.

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, GraphType, Paragraph, Widget};
use ratatui::Frame;
use unicode_width::UnicodeWidthStr;

use super::live::{Live, Rank};
use super::runs::{fit, printable};
use crate::run::progress::span;
use crate::run::survey::State;

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
    let mut numbers = wrapped(&numbers(live), width);
    numbers.truncate((area.height / 6).into());
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
        let most = (body.height / 4).max(4);
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
    let left = live.left_s().map_or(String::new(), |left| format!(", {} left", span(left)));
    let text = fit(&format!("step {step} of {steps}{left} "), area.width.into());
    let room = usize::from(area.width).saturating_sub(text.width());
    let done = room * step.min(steps) / steps.max(1);
    let bar = Span::styled("█".repeat(done) + &"░".repeat(room - done), Color::Cyan);
    Line::from_iter([Span::from(text), bar]).render(area, buffer);
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
    if high > low {
        (low, high)
    } else {
        (low, low + 1.0)
    }
}

fn ranks(live: &Live, area: Rect, buffer: &mut Buffer) {
    if area.is_empty() {
        return;
    }
    let mut all: Vec<(&usize, &Rank)> = live.ranks.iter().collect();
    // Those that the others wait for come first: silent ones, then those that are behind.
    all.sort_by_key(|(rank, known)| (live.silence(known).is_none(), known.last.step, **rank));
    let shown = all.len().min(usize::from(area.height).saturating_sub(2));
    let title = if shown < all.len() { format!("ranks: {shown} of {}", all.len()) } else { "ranks".into() };
    let block = Block::bordered().title(fit(&title, area.width.saturating_sub(2).into()));
    let inner = block.inner(area);
    block.render(area, buffer);
    let line = |(rank, known): &(&usize, &Rank)| {
        let Rank { last, .. } = known;
        let (host, doing, step) = (printable(&last.host), last.phase.name(), last.step);
        match live.silence(known) {
            Some(silence) => {
                let text = format!("{rank} {host}: silent for {}, {doing}, step {step}", span(silence.as_secs_f64()));
                Line::styled(fit(&text, inner.width.into()), Style::from(Color::Red).add_modifier(Modifier::BOLD))
            }
            None if live.state == Some(State::Running) => {
                let for_long = last.phase_s >= QUIET_S;
                let since = if for_long { format!(" for {}", span(last.phase_s as f64)) } else { String::new() };
                Line::from(fit(&format!("{rank} {host}: step {step}, {doing}{since}"), inner.width.into()))
            }
            None => Line::from(fit(&format!("{rank} {host}: last heard of at step {step}"), inner.width.into())),
        }
    };
    let lines: Vec<Line> = all[..shown].iter().map(line).collect();
    Paragraph::new(lines).render(inner, buffer);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::lease::Lease;
    use crate::run::tables::{EvalRow, Table, TrainRow};
    use crate::watch::heartbeats::{write, Heartbeat};
    use crate::watch::{Phase, Place};
    use std::fs;
    use std::time::{Duration, Instant};

    /// A run of eight ranks at step 1,200 of 20,000. Rank 3 is silent, and rank 5 is behind.
    fn run(folder: &std::path::Path, now: Instant) -> Live {
        for name in ["checkpoints", "heartbeats"] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        fs::write(folder.join("config.yaml"), "train: {steps: 20000, eval_every: 500}\n...\n").unwrap();
        let (mut train, _) = Table::open::<TrainRow>(&folder.join("train.csv"), 0).unwrap();
        let (mut eval, _) = Table::open::<EvalRow>(&folder.join("eval.csv"), 0).unwrap();
        for step in 1..=1200 {
            let loss = 4.0 + 6.0 / (1.0 + step as f64 / 50.0) + 0.2 * (step as f64 * 1.7).sin();
            let elapsed_s = step as f64 * 0.5;
            let row =
                TrainRow { step, loss, tokens_per_s: 25_000.0, elapsed_s, mfu: Some(0.41), ..TrainRow::default() };
            train.append(&row).unwrap();
            if step % 500 == 0 {
                let row = EvalRow { step, split: "valid".into(), loss: loss + 0.1, eval_s: 10.0, ..EvalRow::default() };
                eval.append(&row).unwrap();
            }
        }
        let beat = |beat: u64| {
            for rank in 0..8 {
                let (host, world_size) = (format!("node{rank}"), 8);
                let place = Place { rank, world_size, local_rank: 0, node: rank, nodes: 8, host: host.clone() };
                let heartbeat = Heartbeat {
                    rank,
                    host,
                    pid: 1,
                    step: if rank == 5 { 1199 } else { 1200 },
                    phase: if rank == 5 { Phase::Step } else { Phase::Exchange },
                    phase_s: 2,
                    beat: if rank == 3 { 1 } else { beat },
                    every_s: 1,
                };
                write(&folder.join("heartbeats"), &place, &heartbeat).unwrap();
            }
        };
        let mut live = Live::open(folder).unwrap();
        beat(1);
        live.look(now);
        beat(2);
        live.look(now + Duration::from_secs(20));
        live
    }

    #[test]
    fn a_run_is_drawn_in_any_size() {
        let folder = tempfile::tempdir().unwrap();
        let lease = Lease::take(folder.path()).unwrap();
        let live = run(folder.path(), Instant::now());
        drop(lease);
        // 18,800 steps of half a second, and 38 evaluations of ten seconds.
        assert_eq!(live.left_s(), Some(18_800.0 * 0.5 + 38.0 * 10.0));
        let shown = |width, height| snapshot(&live, width, height);
        for (width, height, parts) in [
            (
                80,
                24,
                vec![
                    "step 1200 of 20000, 2 h 43 min left █",
                    "loss: training, and validation as o",
                    "tokens/s",
                    "q leaves",
                ],
            ),
            (40, 20, vec!["step 1200 of 20000, 2 h 43 min left", "loss: training", "3 node3: silent", "ranks: 2 of 8"]),
            (
                160,
                50,
                vec!["running, no new row for 20 s", "5 node5: step 1199, computing", "7 node7: step 1200", "MFU 41 %"],
            ),
        ] {
            let shown = shown(width, height);
            for part in parts {
                assert!(shown.contains(part), "no {part:?} in\n{shown}");
            }
            // Whom all others wait for comes first.
            let silent = shown.find("3 node3: silent for 20 s").unwrap_or_else(|| panic!("{shown}"));
            assert!(!shown[..silent].contains(" node"), "{shown}");
        }
        for width in 0..60 {
            for height in 0..30 {
                let shown = shown(width, height);
                assert!(shown.lines().all(|line| line.width() <= width.into()), "{shown}");
            }
        }
    }

    #[test]
    fn a_curve_of_many_points_keeps_its_ends_and_leaves_out_what_is_not_finite() {
        let curve: Vec<(f64, f64)> =
            (1..=1000).map(|x| (f64::from(x), if x % 7 == 0 { f64::NAN } else { 2.0 })).collect();
        let few = thinned(&curve, 100);
        assert!(few.len() <= 100 && few.iter().all(|&(_, y)| y == 2.0));
        assert_eq!((few[0].0, few[few.len() - 1].0), (1.0, 1000.0));
        assert_eq!(thinned(&curve[..3], 100), curve[..3]);
        assert!(thinned(&[(1.0, f64::NAN)], 100).is_empty());
    }
}
