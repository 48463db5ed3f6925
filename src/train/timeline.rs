//! Where the time of a step goes.

use std::time::Instant;

use crate::comm::Comm;
use crate::error::Result;
use crate::torch::{Mark, Marks};

/// The parts of a step; the numbers are places in [`Laps::finish`]'s result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Data,
    Compute,
    CommExposed,
    Optimizer,
}

/// A step's time, cut where one part ends and the next begins, so that the parts add up to the whole.
///
/// On a GPU the cuts are made in the device's own time. The host runs ahead of it, and waits for it once a step.
pub(super) struct Laps {
    marks: Marks,
    /// When the host began the step.
    start: Instant,
    /// When the device did.
    first: Mark,
    /// The ends of the parts so far.
    ends: Vec<(Part, Mark)>,
}

impl Laps {
    /// Begins a step, of which the host's part began at `start`.
    pub fn begin(marks: &Marks, start: Instant) -> Result<Self> {
        Ok(Self { first: marks.mark()?, marks: marks.clone(), start, ends: Vec::new() })
    }

    /// What the device was given since the last cut belongs to `part`.
    pub fn end(&mut self, part: Part) -> Result<()> {
        self.ends.push((part, self.marks.mark()?));
        Ok(())
    }

    /// Waits until the device has computed all micro-steps but the last `ahead` of those given to it. So the host cannot run
    /// further ahead of it than that, and a device that hangs is missed by the deadline of a micro-step.
    pub fn wait_for_compute(&self, comm: &Comm, ahead: usize) -> Result<()> {
        let mut computed = self.ends.iter().rev().filter(|(part, _)| *part == Part::Compute);
        computed.nth(ahead).map_or(Ok(()), |(_, mark)| comm.wait_for(mark))
    }

    /// Waits for the end of the step, and returns the milliseconds of each part. What the device's time does not show, such
    /// as the host's choice of samples while the device is idle, counts as data.
    pub fn finish(self, comm: &Comm) -> Result<[f64; 4]> {
        let mut times = [0.0; 4];
        let mut last = &self.first;
        if let Some((_, end)) = self.ends.last() {
            comm.wait_for(end)?;
        }
        for (part, end) in &self.ends {
            times[*part as usize] += end.ms_since(last)?;
            last = end;
        }
        let whole = self.start.elapsed().as_secs_f64() * 1000.0;
        times[Part::Data as usize] += (whole - times.iter().sum::<f64>()).max(0.0);
        Ok(times)
    }
}
