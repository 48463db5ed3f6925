//! Restarts that lead nowhere: a job that Slurm starts again and again at the same step must come to an end.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::write_durably;
use crate::launcher::SlurmJob;

/// The step at which a job last started: `restarts.json` in the run directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Start {
    job: String,
    /// The step that it went on from.
    step: usize,
    /// Slurm's count of restarts when the job first stood at this step.
    since: u64,
}

/// Notes that this job resumes after `step`, if Slurm runs it.
///
/// # Errors
/// Stuck, if Slurm has started it again more than `most` times since it first stood there (0: never): nothing queues a job of
/// that class again. Storage, if the note cannot be written.
pub fn note_start(run_dir: &Path, step: usize, most: u32) -> Result<()> {
    let Some(SlurmJob { id: job, restarts, .. }) = SlurmJob::from_environment() else { return Ok(()) };
    let path = run_dir.join("restarts.json");
    // A note that cannot be read counts as none: it only bounds repetitions, which a damaged file does not make.
    let last = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let now = now_at(last, job, step, restarts);
    if most > 0 && restarts - now.since > most.into() {
        return Err(Error::Stuck(format!(
            "Slurm has started this job {} times again after step {step}, and it never got to a later checkpoint; it is not \
             queued again. The logs in {} tell why; a smaller train.save_every saves more often; to try again, submit it anew",
            restarts - now.since,
            run_dir.join("logs").display()
        ))
        .into());
    }
    write_durably(&path, (serde_json::to_string_pretty(&now)? + "\n").as_bytes())
}

fn now_at(last: Option<Start>, job: String, step: usize, restarts: u64) -> Start {
    let same = last.filter(|last| last.job == job && last.step == step && last.since <= restarts);
    Start { since: same.map_or(restarts, |last| last.since), job, step }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_restarts_at_the_same_step_of_the_same_job_count() {
        let start = |step, restarts, last: &Option<Start>| now_at(last.clone(), "7".into(), step, restarts);
        let first = start(0, 0, &None);
        let again = start(0, 1, &Some(first.clone()));
        assert_eq!((first.since, again.since), (0, 0));
        let further = start(20, 2, &Some(again.clone()));
        assert_eq!(further.since, 2);
        assert_eq!(start(20, 5, &Some(further.clone())).since, 2);
        // Another job, or the same number after Slurm's database was reset.
        assert_eq!(now_at(Some(further.clone()), "8".into(), 20, 5).since, 5);
        assert_eq!(start(20, 1, &Some(further)).since, 1);
    }

    #[test]
    fn half_a_note_is_none() {
        let whole = serde_json::to_vec_pretty(&now_at(None, "7".into(), 20, 3)).unwrap();
        for cut in 0..whole.len() {
            assert!(serde_json::from_slice::<Start>(&whole[..cut]).is_err(), "cut at byte {cut}");
        }
    }
}
