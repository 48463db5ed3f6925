//! Text from a trained model: sampling by temperature, top-k and top-p.

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::decode::Decoder;
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
/// with `end_of_text`. On a CPU, what follows a prompt is computed with matrices of type `kind`, `Float` or `BFloat16`.
pub fn generate(
    model: &Gpt,
    prompts: &[Vec<u32>],
    tokens: usize,
    sampling: &Sampling,
    end_of_text: u32,
    kind: Kind,
) -> Vec<Vec<u32>> {
    let block = model.shape.block_size as usize;
    let device = model.parameters.flat.device();
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
    let mut decoder: Option<Decoder> = None;
    let mut seen = 0; // tokens of each row that have left the view or are in the cache
    for length in shortest..longest + tokens {
        if decoder.as_ref().map_or(cache.len() as usize, Decoder::len) == block {
            (cache, decoder) = (model.cache(rows.len() as i64), None);
            seen = length - block / 2;
        }
        let logits = match &mut decoder {
            Some(decoder) => decoder.step(&rows.iter().map(|row| row[length - 1]).collect::<Vec<_>>()),
            None => {
                let part = |row: &Vec<u32>| row[seen..length].iter().map(|&id| i64::from(id)).collect::<Vec<_>>();
                let ids = Tensor::from_slice(&rows.iter().flat_map(part).collect::<Vec<_>>());
                let ids = ids.view([rows.len() as i64, (length - seen) as i64]).to_device(device);
                let hidden = model.hidden(&ids, Some(&mut cache));
                let last = hidden.select(1, hidden.size()[1] - 1); // (rows, C)
                if device == Device::Cpu {
                    decoder = Some(Decoder::new(model, &cache, kind));
                }
                floats(&model.logits(&last)) // (rows, V)
            }
        };
        seen = length;
        let drawn = |number: usize, row: &Vec<u32>, logits: &[f32]| {
            let random = mix(mix(sampling.seed, number as u64), (length - lengths[number]) as u64);
            (row.len() == length).then(|| draw(logits, sampling, random))
        };
        let width = logits.len() / rows.len();
        rows.par_iter_mut().zip(logits.par_chunks(width)).enumerate().for_each(|(number, (row, logits))| {
            row.extend(drawn(number, row, logits));
        });
    }
    rows.iter().zip(lengths).map(|(row, length)| row[length..length + tokens].to_vec()).collect()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    let mut values = vec![0f32; tensor.numel()];
    tensor.to_device(Device::Cpu).copy_data(&mut values, tensor.numel());
    values
}

/// Draws a token by its logits; `random` is the randomness.
fn draw(logits: &[f32], sampling: &Sampling, random: u64) -> u32 {
    let mut ranked = Ranked { logits, order: (0..logits.len() as u32).collect(), ranked: 0 };
    let Some(best) = ranked.get(0) else { return 0 };
    if sampling.temperature == 0.0 {
        return best;
    }
    let highest = f64::from(logits[best as usize]);
    let weight = |id: u32| ((f64::from(logits[id as usize]) - highest) / sampling.temperature).exp();
    let most = sampling.top_k.unwrap_or(logits.len()).clamp(1, logits.len());
    let mut total: f64 = match most < logits.len() {
        true => (0..most).filter_map(|rank| ranked.get(rank)).map(weight).sum(),
        false => (0..logits.len() as u32).map(weight).sum(),
    };
    if let Some(p) = sampling.top_p {
        let enough = p * total;
        total = 0.0;
        for id in (0..most).map_while(|rank| ranked.get(rank)) {
            total += weight(id);
            if total >= enough {
                break;
            }
        }
    }
    // 53 random bits: a uniform number from 0 to below 1.
    let mut point = (random >> 11) as f64 / (1u64 << 53) as f64 * total;
    for id in (0..most).map_while(|rank| ranked.get(rank)) {
        point -= weight(id);
        if point < 0.0 {
            return id;
        }
    }
    best // by the last bit of a sum
}

/// Tokens, the likeliest first and of equals the lower number; sorted no further than is asked for.
struct Ranked<'a> {
    logits: &'a [f32],
    order: Vec<u32>,
    /// So many at the front of `order` are in their places.
    ranked: usize,
}

impl Ranked<'_> {
    /// The token with this rank, from 0.
    fn get(&mut self, rank: usize) -> Option<u32> {
        while rank >= self.ranked && self.ranked < self.order.len() {
            let by_logit =
                |a: &u32, b: &u32| self.logits[*b as usize].total_cmp(&self.logits[*a as usize]).then(a.cmp(b));
            let more = (3 * self.ranked).max(32).min(self.order.len() - self.ranked);
            let rest = &mut self.order[self.ranked..];
            rest.select_nth_unstable_by(more - 1, by_logit);
            rest[..more].sort_unstable_by(by_logit);
            self.ranked += more;
        }
        self.order.get(rank).copied()
    }
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
