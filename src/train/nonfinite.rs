//! When a loss or a gradient is not finite: whose fault it is, and whether the run goes on without that batch.

use tch::{no_grad, Tensor};
use tracing::warn;

use super::Trainer;
use crate::config::NonFinite;
use crate::data::loader::Batch;
use crate::error::{Error, Result};

/// Batches in a row that may be skipped: if more are bad, it is the weights that are bad, not the batches.
const MOST_IN_A_ROW: usize = 10;

impl Trainer<'_> {
    /// Every rank calls this together, after an update that changed nothing: says which rank's numbers are not finite, for
    /// which samples, and in which parameters' gradients first. Returns if the batch may be skipped.
    ///
    /// # Errors
    /// Numbers, if `fault.nonfinite` is `stop`, or too many batches in a row were skipped.
    pub(super) fn not_finite(&mut self, step: usize, global: &[usize], loss: f64, grad_norm: f64) -> Result<()> {
        let (own_loss, names) = self.compute_again(step, global)?;
        let guilty = !own_loss.is_finite() || !names.is_empty();
        if guilty {
            let mine = self.loader.share(global);
            // Every rank's warnings are shown, so this names the rank and its samples although rank 0 reports.
            warn!(
                "rank {}: step {step}: its loss is {own_loss}; first gradients that are not finite: {}; its samples: \
                 {:?}{}",
                self.comm.rank,
                if names.is_empty() { "none".into() } else { names[..names.len().min(3)].join(", ") },
                &mine[..mine.len().min(32)],
                if mine.len() > 32 { " ..." } else { "" }
            );
        }
        let guilty: Vec<usize> = self
            .comm
            .gather(&[f64::from(u8::from(guilty))])?
            .iter()
            .enumerate()
            .filter_map(|(rank, said)| (said[0] > 0.0).then_some(rank))
            .collect();
        let whose = match guilty.is_empty() {
            true => "the sum over the ranks".into(),
            false => format!("ranks {guilty:?}"),
        };
        let what = format!(
            "step {step}: the loss is {loss} and the gradient's norm {grad_norm}, because of {whose}; nothing was changed"
        );
        self.skipped += 1;
        if self.plan.config.fault.nonfinite == NonFinite::Skip && self.skipped <= MOST_IN_A_ROW {
            if self.comm.is_root() {
                warn!("{what}; the batch is skipped, as fault.nonfinite asks ({} in a row)", self.skipped);
            }
            return Ok(());
        }
        let so_far = match self.skipped {
            1 => String::new(),
            n => format!(" {} batches before it were skipped.", n - 1),
        };
        Err(Error::Numbers(format!(
            "{what}.{so_far} The lines above name samples and parameters. Try a lower optim.lr, more optim.warmup_steps, or \
             fp32"
        ))
        .into())
    }

    /// This rank's part of the step once more, alone, since its gradients are gone into the sum: its loss, and the names
    /// of the parameters whose gradients are not finite. The weights are those of before, so the numbers are, too.
    fn compute_again(&mut self, step: usize, global: &[usize]) -> Result<(f64, Vec<String>)> {
        self.model.parameters.zero_grad();
        let mut loss = 0.0;
        for micro_step in 0..self.plan.accumulation {
            let batch = self.loader.micro_batch(global, micro_step, self.device)?;
            let Batch { inputs, targets, weights, counted } = &batch;
            let seed = self.dropout_seed(step, micro_step);
            let counted = counted.as_ref();
            let mine = self.model.forward_backward(inputs, targets, weights, counted, seed, &mut |_, _| ());
            loss += mine.double_value(&[0]);
        }
        let parameters = &self.model.parameters;
        if !loss.is_finite() {
            // The loss has made this element so ([`Gpt::forward_backward`]), whatever its gradient.
            let _ = no_grad(|| parameters.grad.narrow(0, 0, 1).zero_());
        }
        let finite = |tensor: &Tensor| tensor.isfinite().all().int64_value(&[]) == 1;
        let bad = parameters.specs.iter().filter(|spec| !finite(&spec.view(&parameters.grad)));
        Ok((loss, bad.map(|spec| spec.name.clone()).collect()))
    }
}
