//! What is done between two steps: evaluations, samples, checkpoints, and the end on request.

use std::time::Instant;

use tracing::debug;

use super::Trainer;
use crate::comm::{Comm, Deadlines};
use crate::error::{Error, Result};
use crate::model::generate::{generate, Sampling};
use crate::run::checkpoint::{self, Saving};
use crate::run::Recorder;
use crate::watch::Phase;

impl<'a> Trainer<'a> {
    /// Evaluates, samples and saves, if that is due after the step done and has not been done yet: after a stop, the
    /// resumed run begins with what the stopped one left out.
    pub(super) fn between_steps(&mut self) -> Result<()> {
        let aside = Instant::now();
        if self.written {
            self.publish_save()?;
        }
        let (step, plan) = (self.state.step, &self.plan.config.train);
        let last = step == plan.steps;
        let due = |every: usize| every > 0 && (last || step.is_multiple_of(every));
        let mut save = last || due(plan.save_every);
        let sample = due(plan.sample_every) || (plan.sample_every > 0 && step == 1);
        if due(plan.eval_every) {
            // What is on its way belongs to the best evaluation so far, which this one may change.
            self.wait_for_save()?;
            save |= self.evaluate(step)?;
        }
        if sample {
            self.enter(Phase::Exchange);
            self.gather_weights()?;
            self.sample(step)?;
        }
        if save {
            self.save()?;
        }
        if last {
            self.wait_for_save()?;
        }
        self.speed.pause(aside.elapsed());
        Ok(())
    }

    /// Saves at once, since whoever asked may not wait; what else is due at this step is done by the resumed run.
    pub(super) fn preempt(&mut self) -> Result<()> {
        self.save()?;
        // A launcher may end the job as soon as one rank leaves.
        self.wait_for_save()?;
        Err(Error::Preempted(format!(
            "stopped on request after step {} of {}, saved in {}; to go on, start the same command again (with --resume \
             auto, the default)",
            self.state.step,
            self.plan.config.train.steps,
            self.dir.checkpoints().display()
        ))
        .into())
    }

    fn evaluate(&mut self, step: usize) -> Result<bool> {
        let Some(valid) = &self.valid else { return Ok(false) };
        self.enter(Phase::Exchange);
        if !self.comm.any(self.recorder.as_ref().is_some_and(|recorder| !recorder.has_evaluation(step)))? {
            return Ok(false);
        }
        let row = valid.run(self.comm, &self.model, self.device, step, |phase| self.enter(phase))?;
        self.enter(Phase::Evaluation);
        let improved = match &mut self.recorder {
            Some(recorder) => recorder.evaluation(&row)?,
            None => false,
        };
        self.enter(Phase::Exchange);
        self.comm.any(improved)
    }

    fn sample(&mut self, step: usize) -> Result<()> {
        let Some(recorder) = self.recorder.as_mut().filter(|recorder| !recorder.has_sample(step)) else {
            return Ok(());
        };
        self.watchdog.enter(Phase::Sampling, step);
        let prompts = match &self.plan.config.train.prompts[..] {
            [] => &[String::new()],
            prompts => prompts,
        };
        let ids: Vec<Vec<u32>> = prompts.iter().map(|prompt| self.tokenizer.encode(prompt)).collect();
        let sampling = Sampling { temperature: 0.8, top_k: Some(40), top_p: None, seed: self.loader.seed };
        let end_of_text = self.tokenizer.end_of_text();
        let mut text = String::new();
        for (prompt, ids) in
            prompts.iter().zip(generate(&self.model, &ids, 64, &sampling, end_of_text, self.model.kind()))
        {
            text += &format!("{prompt}{}\n\n", String::from_utf8_lossy(&self.tokenizer.decode(&ids)?));
        }
        recorder.sample(step, &text)
    }

    /// Begins to save, once an earlier save is done.
    fn save(&mut self) -> Result<()> {
        self.wait_for_save()?;
        self.enter(Phase::Save);
        let checkpoints = self.dir.checkpoints();
        // One that is there already has the same bits: the run resumed from it.
        let here = || checkpoint::list(&checkpoints).iter().any(|(step, _)| *step == self.state.step);
        let mut needed = self.comm.is_root() && !here();
        let writers = self.writers();
        if let Some(comm) = writers {
            needed = comm.any(needed)?;
        }
        if !needed {
            return self.saved();
        }
        self.recorder.as_ref().map_or(Ok(()), Recorder::sync)?;
        self.gather_weights()?;
        let Self { state, model, optimizer, .. } = &*self;
        self.saving = Some(Saving::begin(&checkpoints, state, &model.parameters, optimizer, writers)?);
        Ok(())
    }

    /// Makes the save that is under way a checkpoint, once it is written, and clears what is no longer kept.
    fn publish_save(&mut self) -> Result<()> {
        let Some(saving) = self.saving.take() else { return Ok(()) };
        self.enter(Phase::Save);
        let may_publish = || self.recorder.as_ref().map_or(Ok(()), Recorder::check);
        let path = saving.publish(self.writers(), may_publish)?;
        debug!("saved {}", path.display());
        self.saved()
    }

    /// Waits until no rank saves any more: others may have nothing to write, and yet must not go ahead to where they would
    /// wait no longer than a step may take.
    fn wait_for_save(&mut self) -> Result<()> {
        self.publish_save()?;
        self.enter(Phase::Waiting);
        let Deadlines { step, save, .. } = self.comm.deadlines;
        self.comm.barrier(step.max(save))
    }

    fn saved(&mut self) -> Result<()> {
        match &mut self.recorder {
            Some(recorder) => recorder.saved(self.plan.config.train.keep_last),
            None => Ok(()),
        }
    }

    /// The ranks that write a checkpoint together: all, if each has its part of the optimizer's state.
    fn writers(&self) -> Option<&'a Comm> {
        self.gradients.is_sharded().then_some(self.comm)
    }
}
