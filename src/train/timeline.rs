//! Where the time of a step goes.

use std::time::Instant;

use crate::comm::Comm;
use crate::error::Result;
use crate::torch::{Mark, Marks};
use crate::watch::{Phase, Watchdog};

/// The parts of a step; the numbers are places in [`Timeline::end`]'s times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Data,
    Compute,
    /// With the other ranks; what of it no computation hides.
    Exchange,
    Optimizer,
}

impl Part {
    fn phase(self) -> Phase {
        match self {
            Self::Data | Self::Compute | Self::Optimizer => Phase::Step,
            Self::Exchange => Phase::Exchange,
        }
    }
}

/// A step's time, cut where one part ends and the next begins, so that the parts add up to the whole. Each cut is progress to
/// the watchdog.
///
/// On a GPU the cuts are made in the device's own time. The host runs ahead of it, and waits for it once a step.
pub(super) struct Timeline<'a> {
    comm: &'a Comm,
    watchdog: &'a Watchdog,
    marks: Marks,
    step: usize,
    /// When the host began the step.
    start: Instant,
    /// When each part began in the device's time.
    cuts: Vec<(Part, Mark)>,
}

impl<'a> Timeline<'a> {
    /// Begins a step, with its data.
    pub fn begin(comm: &'a Comm, watchdog: &'a Watchdog, marks: &Marks, step: usize) -> Result<Self> {
        let start = Instant::now();
        watchdog.enter(Phase::Step, step);
        let cuts = vec![(Part::Data, marks.mark()?)];
        Ok(Self { comm, watchdog, marks: marks.clone(), step, start, cuts })
    }

    /// What the device is given from now on belongs to `part`.
    ///
    /// At a new micro-batch's data, the host waits until the device has computed all micro-batches but the last, so that it
    /// cannot run further ahead, and a device that hangs is missed by the deadline of a micro-batch.
    pub fn enter(&mut self, part: Part) -> Result<()> {
        self.cuts.push((part, self.marks.mark()?));
        if part == Part::Data {
            self.wait_for_compute(1)?;
        }
        self.watchdog.enter(part.phase(), self.step);
        Ok(())
    }

    /// Waits until the device has computed all micro-batches but the last `ahead` of those given to it.
    fn wait_for_compute(&self, ahead: usize) -> Result<()> {
        let ends = self.cuts.windows(2).rev().filter(|pair| pair[0].0 == Part::Compute).map(|pair| &pair[1].1);
        ends.skip(ahead).take(1).try_for_each(|end| self.comm.wait_for(end))
    }

    /// Waits for the end of the step, and returns the milliseconds of each part, and when the waiting ended. What the
    /// device's time does not show, such as the host's choice of samples while the device is idle, counts as data.
    pub fn end(self) -> Result<([f64; 4], Instant)> {
        let end = self.marks.mark()?;
        self.wait_for_compute(0)?;
        self.watchdog.enter(Phase::Exchange, self.step);
        self.comm.wait_for(&end)?;
        let mut times = [0.0; 4];
        let ends = self.cuts.iter().skip(1).map(|(_, mark)| mark).chain([&end]);
        for ((part, begin), end) in self.cuts.iter().zip(ends) {
            times[*part as usize] += end.ms_since(begin)?;
        }
        let now = Instant::now();
        let whole = now.duration_since(self.start).as_secs_f64() * 1000.0;
        times[Part::Data as usize] += (whole - times.iter().sum::<f64>()).max(0.0);
        Ok((times, now))
    }
}
