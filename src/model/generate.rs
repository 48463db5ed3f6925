//! Text from a trained model: sampling by temperature, top-k and top-p.

use tch::{Device, Kind, Tensor};

use super::gpt::Gpt;
use crate::random::mix;

/// How the next token is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Only the k likeliest tokens may be drawn.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together reach this probability may be drawn (Holtzman et al. 2020).
    pub top_p: Option<f64>,
    /// Fixes every draw.
    pub seed: u64,
}

/// Continues each prompt by `tokens` tokens and returns the continuations.
///
/// Row r's draws depend on the seed, r and the position alone. The prompts advance together: if one is longer than
/// the shortest, its own tokens are taken until it ends. A prompt longer than the model's block counts by its end; once
/// a sequence fills the block, the later half of it stays in view and the earlier is forgotten. An empty prompt begins
/// with `end_of_text`.
pub fn generate(
    model: &Gpt,
    prompts: &[Vec<u32>],
    tokens: usize,
    sampling: &Sampling,
    end_of_text: u32,
) -> Vec<Vec<u32>> {
    let block = model.shape.block_size as usize;
    let mut rows: Vec<Vec<u32>> = prompts
        .iter()
        .map(|prompt| match prompt.len() {
            0 => vec![end_of_text],
            n => prompt[n.saturating_sub(block)..].to_vec(),
        })
        .collect();
    let lengths: Vec<usize> = rows.iter().map(Vec::len).collect();
    let (Some(&shortest), Some(&longest)) = (lengths.iter().min(), lengths.iter().max()) else { return Vec::new() };
    let mut cache = model.cache(rows.len() as i64);
    let mut seen = 0; // tokens of each row that have left the view or are in the cache
    for length in shortest..longest + tokens {
        if cache.len() as usize == block {
            cache = model.cache(rows.len() as i64);
            seen = length - block / 2;
        }
        let window: Vec<i64> = rows.iter().flat_map(|row| row[seen..length].iter().map(|&id| i64::from(id))).collect();
        let ids = Tensor::from_slice(&window)
            .view([rows.len() as i64, (length - seen) as i64])
            .to_device(model.parameters.flat.device());
        seen = length;
        let hidden = model.hidden(&ids, Some(&mut cache));
        let last = hidden.select(1, hidden.size()[1] - 1); // (rows, C)
        let logits = model.logits(&last).to_device(Device::Cpu); // (rows, V)
        for (number, row) in rows.iter_mut().enumerate() {
            if row.len() == length {
                let random = mix(mix(sampling.seed, number as u64), (length - lengths[number]) as u64);
                row.push(draw(&floats(&logits.get(number as i64)), sampling, random));
            }
        }
    }
    rows.iter().zip(lengths).map(|(row, length)| row[length..length + tokens].to_vec()).collect()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    let mut values = vec![0f32; tensor.numel()];
    tensor.to_kind(Kind::Float).copy_data(&mut values, tensor.numel());
    values
}

/// Draws a token by its logits; `random` is the randomness.
fn draw(logits: &[f32], sampling: &Sampling, random: u64) -> u32 {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let keep = match sampling.top_k {
        _ if sampling.temperature == 0.0 => 1,
        Some(k) => k.clamp(1, order.len()),
        None => order.len(),
    };
    if keep < order.len() {
        order.select_nth_unstable_by(keep - 1, by_logit);
        order.truncate(keep);
    }
    order.sort_unstable_by(by_logit);
    let Some(&best) = order.first() else { return 0 };
    let highest = f64::from(logits[best as usize]);
    let temperature = sampling.temperature.max(f64::MIN_POSITIVE);
    let weight = |id: &u32| ((f64::from(logits[*id as usize]) - highest) / temperature).exp();
    let weights: Vec<f64> = order.iter().map(weight).collect();
    let whole: f64 = weights.iter().sum();
    let mut reached = 0.0;
    let within = weights.iter().take_while(|&&weight| {
        let below = reached < sampling.top_p.unwrap_or(1.0) * whole;
        reached += weight;
        below
    });
    let kept = within.count().max(1);
    let total: f64 = weights[..kept].iter().sum();
    // 53 random bits: a uniform number from 0 to below 1.
    let mut point = (random >> 11) as f64 / (1u64 << 53) as f64 * total;
    for (id, weight) in order[..kept].iter().zip(&weights) {
        point -= weight;
        if point < 0.0 {
            return *id;
        }
    }
    order[kept - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: None, top_p: None, seed: 1 };

    #[test]
    fn greedy_takes_the_likeliest_and_the_first_of_equals() {
        assert_eq!(draw(&[0.0, 3.0, 3.0, 1.0], &GREEDY, u64::MAX), 1);
    }

    #[test]
    fn top_k_and_top_p_bound_what_is_drawn() {
        let logits = [0.0, 2.0, 1.0, -1.0];
        let drawn = |sampling: Sampling| -> std::collections::BTreeSet<u32> {
            (0..2000).map(|n| draw(&logits, &sampling, mix(5, n))).collect()
        };
        let free = Sampling { temperature: 1.0, ..GREEDY };
        assert_eq!(drawn(free).len(), 4);
        assert_eq!(drawn(Sampling { top_k: Some(2), ..free }), [1, 2].into());
        // 1 has 0.64 of the probability, 1 and 2 have 0.88.
        assert_eq!(drawn(Sampling { top_p: Some(0.6), ..free }), [1].into());
        assert_eq!(drawn(Sampling { top_p: Some(0.7), ..free }), [1, 2].into());
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0f32, 1.0];
        let free = Sampling { temperature: 1.0, ..GREEDY };
        let ones = (0..20_000).filter(|&n| draw(&logits, &free, mix(9, n)) == 1).count();
        let expected = 1.0 / (1.0 + (-1.0f64).exp());
        assert!((ones as f64 / 20_000.0 - expected).abs() < 0.01, "{ones}");
    }
}
