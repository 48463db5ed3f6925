//! Softmax and cross-entropy of one row of logits, for the CPU: three passes over a row that stays in the caches.
//!
//! LibTorch would make six passes over a whole chunk, through memory. Written in plain Rust that the compiler vectorises,
//! compiled for AVX-512, AVX2 and the machine's baseline, and chosen at run time.
#![allow(unsafe_code)]

use std::cell::RefCell;

use crate::torch::bf16;

/// Accumulators side by side: enough for four AVX-512 registers to be in flight.
const LANES: usize = 64;

/// The negative log-likelihood of `target` under the softmax of `logits`, and whether no other logit is larger.
///
/// With a `weight`, the logits are replaced by the gradient of weight times that: weight * (softmax - one-hot).
/// `target` must be an index of `logits`.
pub fn cross_entropy(logits: &mut [f32], target: usize, weight: Option<f32>) -> (f32, bool) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature that the function is compiled for was detected on this processor just now.
            return unsafe { avx512(logits, target, weight) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: both features that the function is compiled for were detected on this processor just now.
            return unsafe { avx2(logits, target, weight) };
        }
    }
    row(logits, target, weight, |a, b, c| a * b + c)
}

/// The same for logits in bf16, each the upper half of an fp32 number. What is computed with them is fp32.
pub fn cross_entropy_bf16(logits: &mut [u16], target: usize, weight: Option<f32>) -> (f32, bool) {
    thread_local! {
        static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    WIDE.with_borrow_mut(|wide| {
        wide.clear();
        wide.extend(logits.iter().map(|&bits| f32::from_bits(u32::from(bits) << 16)));
        let found = cross_entropy(wide, target, weight);
        if weight.is_some() {
            logits.iter_mut().zip(wide).for_each(|(bits, &mut gradient)| *bits = bf16(gradient));
        }
        found
    })
}

/// Replaces each logit by e to the power of its distance from the largest, and returns that and their sum.
pub fn exponentials(logits: &mut [f32]) -> (f32, f32) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,fma")]
        fn avx512(logits: &mut [f32]) -> (f32, f32) {
            powers(logits, f32::mul_add)
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2(logits: &mut [f32]) -> (f32, f32) {
            powers(logits, f32::mul_add)
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature that the function is compiled for was detected on this processor just now.
            return unsafe { avx512(logits) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: both features that the function is compiled for were detected on this processor just now.
            return unsafe { avx2(logits) };
        }
    }
    powers(logits, |a, b, c| a * b + c)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,fma")]
fn avx512(logits: &mut [f32], target: usize, weight: Option<f32>) -> (f32, bool) {
    row(logits, target, weight, f32::mul_add)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2(logits: &mut [f32], target: usize, weight: Option<f32>) -> (f32, bool) {
    row(logits, target, weight, f32::mul_add)
}

/// `multiply_add(a, b, c)` is a * b + c, in one instruction if the processor has it.
#[inline(always)]
fn row(
    logits: &mut [f32],
    target: usize,
    weight: Option<f32>,
    multiply_add: impl Fn(f32, f32, f32) -> f32 + Copy,
) -> (f32, bool) {
    let picked = logits[target];
    let (largest, sum) = match weight {
        None => {
            let largest = fold(logits, f32::NEG_INFINITY, |most, x| if x > most { x } else { most });
            let mut lanes = [0f32; LANES];
            let mut chunks = logits.chunks_exact(LANES);
            for chunk in &mut chunks {
                for (lane, x) in lanes.iter_mut().zip(chunk) {
                    *lane += exp(x - largest, multiply_add);
                }
            }
            let rest = chunks.remainder().iter().map(|x| exp(x - largest, multiply_add)).sum::<f32>();
            (largest, lanes.iter().sum::<f32>() + rest)
        }
        Some(weight) => {
            let (largest, sum) = powers(logits, multiply_add);
            let scale = weight / sum;
            for x in logits.iter_mut() {
                *x *= scale;
            }
            logits[target] -= weight;
            (largest, sum)
        }
    };
    (sum.ln() - (picked - largest), picked == largest)
}

#[inline(always)]
fn powers(logits: &mut [f32], multiply_add: impl Fn(f32, f32, f32) -> f32 + Copy) -> (f32, f32) {
    let largest = fold(logits, f32::NEG_INFINITY, |most, x| if x > most { x } else { most });
    let mut lanes = [0f32; LANES];
    let mut chunks = logits.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *x = exp(*x - largest, multiply_add);
            *lane += *x;
        }
    }
    let mut rest = 0.0;
    for x in chunks.into_remainder() {
        *x = exp(*x - largest, multiply_add);
        rest += *x;
    }
    (largest, lanes.iter().sum::<f32>() + rest)
}

#[inline(always)]
fn fold(values: &[f32], start: f32, combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = combine(*lane, x);
        }
    }
    lanes.iter().chain(chunks.remainder()).fold(start, |most, &x| combine(most, x))
}

/// e^x for x <= 0, as [`exp`] has it without fused instructions.
pub fn exp_of_negative(x: f32) -> f32 {
    exp(x, |a, b, c| a * b + c)
}

/// e^x for x <= 0 within 2 units in the last place: x = n ln 2 + r, and e^r by its Taylor polynomial.
///
/// Below -87 the result is 0 rather than subnormal. NaN stays NaN.
#[inline(always)]
fn exp(x: f32, multiply_add: impl Fn(f32, f32, f32) -> f32) -> f32 {
    // ln 2 in two parts, the first with so few bits that n times it is exact (Cody and Waite 1980).
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let shifted = multiply_add(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = multiply_add(n, -LN2_LOW, multiply_add(n, -LN2_HIGH, clamped));
    let mut p = 1.0 / 5040.0;
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = multiply_add(p, r, factor);
    }
    // 2^n by its exponent bits: n is -126 to 0, and the low bits of `shifted` are n.
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 {
        0.0
    } else {
        p * power
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exact(logits: &[f32], target: usize, weight: f64) -> (f64, Vec<f64>) {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exps: Vec<f64> = logits.iter().map(|&x| f64::from(x - largest).exp()).collect();
        let sum: f64 = exps.iter().sum();
        let mut gradient: Vec<f64> = exps.iter().map(|e| weight * e / sum).collect();
        gradient[target] -= weight;
        (sum.ln() - f64::from(logits[target] - largest), gradient)
    }

    #[test]
    fn every_compilation_agrees_with_double_precision() {
        let plain = |logits: &mut [f32], target, weight| row(logits, target, weight, |a, b, c| a * b + c);
        // In the first the target is the likeliest.
        for length in [1, 2, 63, 64, 65, 1000] {
            let logits: Vec<f32> = (0..length).map(|i| ((i * 7919) % 1009) as f32 / 17.0 - 30.0).collect();
            let target = length / 2;
            let (loss, gradient) = exact(&logits, target, 0.25);
            let likeliest = logits.iter().all(|&x| x <= logits[target]);
            for compute in [&plain as &dyn Fn(&mut [f32], usize, Option<f32>) -> (f32, bool), &cross_entropy] {
                let mut found = logits.clone();
                let (only, is_likeliest) = compute(&mut found, target, None);
                assert_eq!(is_likeliest, likeliest);
                assert_eq!(found, logits, "without a weight the logits stay");
                let (both, is_likeliest) = compute(&mut found, target, Some(0.25));
                assert_eq!(is_likeliest, likeliest);
                assert!((f64::from(only) - loss).abs() < 1e-5 * (1.0 + loss), "{only} {loss}");
                assert!((f64::from(both) - loss).abs() < 1e-5 * (1.0 + loss), "{both} {loss}");
                for (found, expected) in found.iter().zip(&gradient) {
                    assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} {expected}");
                }
            }
        }
    }

    #[test]
    fn powers_are_those_of_double_precision_however_compiled() {
        let plain = |logits: &mut [f32]| powers(logits, |a, b, c| a * b + c);
        for length in [1, 63, 64, 200] {
            let logits: Vec<f32> = (0..length).map(|i| ((i * 7919) % 1009) as f32 / 17.0 - 30.0).collect();
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let expected: Vec<f64> = logits.iter().map(|&x| f64::from(x - largest).exp()).collect();
            for compute in [&plain as &dyn Fn(&mut [f32]) -> (f32, f32), &exponentials] {
                let mut found = logits.clone();
                let (most, sum) = compute(&mut found);
                assert_eq!(most, largest);
                assert!((f64::from(sum) / expected.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{sum}");
                for (found, expected) in found.iter().zip(&expected) {
                    assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} {expected}");
                }
            }
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in 0..87_000 {
            let x = -(i as f32) / 1000.0;
            let (found, expected) = (exp(x, f32::mul_add), f64::from(x).exp());
            assert!((f64::from(found) / expected - 1.0).abs() < 2.4e-7, "exp({x}) = {found}, expected {expected}");
        }
        assert_eq!(exp(-200.0, f32::mul_add), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY, f32::mul_add), 0.0);
        assert!(exp(f32::NAN, f32::mul_add).is_nan());
    }

    #[test]
    fn what_is_not_finite_shows() {
        assert!(cross_entropy(&mut [1.0, f32::NAN, 2.0], 0, None).0.is_nan());
        let mut with_infinity = vec![0.0; 100];
        with_infinity[70] = f32::INFINITY;
        assert!(!cross_entropy(&mut with_infinity, 0, None).0.is_finite());
    }
}
