//! A matrix times a few vectors, on the CPU: what a token costs in generation.
//!
//! Every weight is read once and used once for each vector, so the memory's bandwidth is the limit, and a matrix in bf16
//! has half the bytes to read. A BLAS is made for large products.

use std::borrow::Cow;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::host;
use crate::torch::bf16;

/// A matrix (N, K) of fp32 or bf16 numbers, row after row.
pub struct Matrix<'a> {
    /// An fp32 number each, or two of bf16, the first in the low half; a row of odd length then ends in a zero.
    bits: Cow<'a, [u32]>,
    width: usize,
    is_bf16: bool,
}

impl<'a> Matrix<'a> {
    /// A view of an fp32 matrix with rows of `width` elements.
    pub fn float(elements: &'a [f32], width: usize) -> Self {
        Self { bits: Cow::Borrowed(pulp::bytemuck::cast_slice(elements)), width, is_bf16: false }
    }

    /// A copy of an fp32 matrix, rounded to bf16.
    pub fn bf16(elements: &[f32], width: usize) -> Self {
        let half = |x: f32| u32::from(bf16(x));
        let pair = |pair: &[f32]| half(pair[0]) | pair.get(1).map_or(0, |&high| half(high) << 16);
        let mut bits = vec![0; elements.len() / width * width.div_ceil(2)];
        let rows = bits.par_chunks_mut(width.div_ceil(2)).zip(elements.par_chunks(width));
        rows.for_each(|(bits, row)| bits.iter_mut().zip(row.chunks(2)).for_each(|(bits, two)| *bits = pair(two)));
        Self { bits: Cow::Owned(bits), width, is_bf16: true }
    }

    /// The `number`th row, (K,).
    pub fn row(&self, number: usize) -> Vec<f32> {
        let length = self.row_bits();
        let bits = &self.bits[number * length..(number + 1) * length];
        if !self.is_bf16 {
            return bits.iter().copied().map(f32::from_bits).collect();
        }
        let halves = bits.iter().flat_map(|pair| [f32::from_bits(pair << 16), f32::from_bits(pair & HIGH)]);
        halves.take(self.width).collect()
    }

    /// Each of `vectors` (n, K) times the matrix: (n, N). A vector's result does not depend on the others.
    pub fn times(&self, vectors: &[f32]) -> Vec<f32> {
        let rows = self.bits.len() / self.row_bits();
        let n = vectors.len() / self.width;
        let mut product = vec![0.0; n * rows];
        let mut vectors = vectors.chunks_exact(self.width);
        let mut products = product.chunks_exact_mut(rows.max(1));
        if n > 1 {
            // (N, AT_ONCE)
            let mut columns = vec![0.0; rows * AT_ONCE];
            for start in (0..n).step_by(AT_ONCE) {
                let length = AT_ONCE.min(n - start);
                let group: Vec<&[f32]> = vectors.by_ref().take(length).collect();
                self.multiply::<AT_ONCE, 2>(&group, &mut columns);
                for (column, product) in products.by_ref().take(length).enumerate() {
                    product
                        .iter_mut()
                        .zip(columns[column..].iter().step_by(AT_ONCE))
                        .for_each(|(to, from)| *to = *from);
                }
            }
        } else if let (Some(vector), Some(product)) = (vectors.next(), products.next()) {
            self.multiply::<1, 1>(&[vector], product);
        }
        product
    }

    /// B vectors at once, or fewer, by R rows at once: `product` (N, B).
    fn multiply<const B: usize, const R: usize>(&self, vectors: &[&[f32]], product: &mut [f32]) {
        // The low and the high halves' elements, or all of them; zeros for a vector that is not there.
        let (row_bits, parts) = (self.row_bits(), if self.is_bf16 { 2 } else { 1 });
        let mut elements = vec![0.0; B * parts * row_bits];
        for (vector, to) in vectors.iter().zip(elements.chunks_exact_mut(parts * row_bits)) {
            for (part, to) in to.chunks_exact_mut(row_bits).enumerate() {
                to.iter_mut().zip(vector.iter().skip(part).step_by(parts)).for_each(|(to, from)| *to = *from);
            }
        }
        let chunk = (product.len() / B).div_ceil(CHUNKS * rayon::current_num_threads()).next_multiple_of(R);
        // A thread is not woken for less than it takes.
        let chunk = chunk.max(SMALLEST_CHUNK / row_bits);
        let arch = Arch::new();
        product.par_chunks_mut(chunk * B).zip(self.bits.par_chunks(chunk * row_bits)).for_each(|(product, rows)| {
            let elements = &elements[..];
            match self.is_bf16 {
                true => arch.dispatch(Tiles::<B, R, 2> { rows, elements, product }),
                false => arch.dispatch(Tiles::<B, R, 1> { rows, elements, product }),
            }
        });
    }

    fn row_bits(&self) -> usize {
        if self.is_bf16 {
            self.width.div_ceil(2)
        } else {
            self.width
        }
    }
}

/// Vectors that meet a row while it is in the registers.
const AT_ONCE: usize = 8;
/// Pieces of work for each thread, so that one that is held up leaves some to the others.
const CHUNKS: usize = 4;
/// Numbers of 32 bits: some microseconds' work.
const SMALLEST_CHUNK: usize = 1 << 14;
/// The high half of a pair.
const HIGH: u32 = 0xffff_0000;

/// The products of some rows with B vectors of H parts, R rows at a time: `product` (rows, B).
struct Tiles<'a, const B: usize, const R: usize, const H: usize> {
    rows: &'a [u32],
    /// (B, H, K / H)
    elements: &'a [f32],
    product: &'a mut [f32],
}

impl<const B: usize, const R: usize, const H: usize> WithSimd for Tiles<'_, B, R, H> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.elements.len() / B / H;
        let mut parts: [[&[f32]; H]; B] = [[&[]; H]; B];
        for (b, vector) in self.elements.chunks_exact(width * H).enumerate() {
            for (h, part) in vector.chunks_exact(width).enumerate() {
                parts[b][h] = part;
            }
        }
        let mut tiles = self.rows.chunks_exact(R * width);
        let mut products = self.product.chunks_exact_mut(R * B);
        let mut ahead = self.rows;
        for (tile, product) in (&mut tiles).zip(&mut products) {
            let mut rows: [&[u32]; R] = [&[]; R];
            for (row, bits) in rows.iter_mut().zip(tile.chunks_exact(width)) {
                *row = bits;
            }
            // The tile after this one is fetched meanwhile. The processor's own guesses end with a page.
            ahead = ahead.get(R * width..).filter(|rest| rest.len() >= R * width).unwrap_or(tile);
            for (product, sums) in product.chunks_exact_mut(B).zip(dot(simd, rows, ahead, parts)) {
                product.copy_from_slice(&sums);
            }
        }
        for (row, product) in tiles.remainder().chunks_exact(width).zip(products.into_remainder().chunks_exact_mut(B)) {
            product.copy_from_slice(&dot(simd, [row], row, parts)[0]);
        }
    }
}

/// R rows times B vectors of H parts each; `ahead`, as many rows, is read next. No closure and no iterator's adaptor computes
/// here: the compiler would not give them the vector instructions.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn dot<S: Simd, const B: usize, const R: usize, const H: usize>(
    simd: S,
    rows: [&[u32]; R],
    ahead: &[u32],
    vectors: [[&[f32]; H]; B],
) -> [[f32; B]; R] {
    let zero = simd.splat_f32s(0.0);
    let mut sums = [[zero; B]; R];
    let whole = rows[0].len() / S::F32_LANES;
    let (mut heads, mut tails): ([&[S::u32s]; R], [&[u32]; R]) = ([&[]; R], [&[]; R]);
    for r in 0..R {
        let (head, tail) = S::as_simd_u32s(rows[r]);
        (heads[r], tails[r]) = (&head[..whole], tail);
    }
    let mut aheads: [&[S::u32s]; R] = [&[]; R];
    for (to, row) in aheads.iter_mut().zip(ahead.chunks_exact(rows[0].len())) {
        *to = &S::as_simd_u32s(row).0[..whole];
    }
    let mut vector_heads: [[&[S::f32s]; H]; B] = [[&[]; H]; B];
    let mut vector_tails: [[&[f32]; H]; B] = [[&[]; H]; B];
    for b in 0..B {
        for h in 0..H {
            let (head, tail) = S::as_simd_f32s(vectors[b][h]);
            (vector_heads[b][h], vector_tails[b][h]) = (&head[..whole], tail);
        }
    }
    for at in 0..whole {
        for r in 0..R {
            host::prefetch(&aheads[r][at]);
        }
        for h in 0..H {
            let mut weights = [zero; R];
            for r in 0..R {
                weights[r] = part::<S, H>(simd, heads[r][at], h);
            }
            for b in 0..B {
                let x = vector_heads[b][h][at];
                for r in 0..R {
                    sums[r][b] = simd.mul_add_e_f32s(weights[r], x, sums[r][b]);
                }
            }
        }
    }
    if !tails[0].is_empty() {
        for h in 0..H {
            for r in 0..R {
                let weights = part::<S, H>(simd, simd.partial_load_u32s(tails[r]), h);
                for b in 0..B {
                    let x = simd.partial_load_f32s(vector_tails[b][h]);
                    sums[r][b] = simd.mul_add_e_f32s(weights, x, sums[r][b]);
                }
            }
        }
    }
    let mut products = [[0.0; B]; R];
    for r in 0..R {
        for b in 0..B {
            products[r][b] = simd.reduce_sum_f32s(sums[r][b]);
        }
    }
    products
}

/// The fp32 numbers in `bits`: the only one of each lane, or its `h`th of two.
#[inline(always)]
fn part<S: Simd, const H: usize>(simd: S, bits: S::u32s, h: usize) -> S::f32s {
    let bits = match (H, h) {
        (1, _) => bits,
        (_, 0) => simd.wrapping_dyn_shl_u32s(bits, simd.splat_u32s(16)),
        _ => simd.and_u32s(bits, simd.splat_u32s(HIGH)),
    };
    simd.transmute_f32s_u32s(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        (0..n as u64).map(|i| (crate::random::mix(seed, i) >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }

    #[test]
    fn products_are_those_of_double_precision() {
        for (rows, width) in [(1, 1), (3, 5), (8, 16), (17, 33), (50, 96), (1025, 64)] {
            let elements = numbers(rows * width, 1);
            for (matrix, tolerance) in [(Matrix::float(&elements, width), 1e-5), (Matrix::bf16(&elements, width), 1e-5)]
            {
                for n in [1, 2, 8, 11] {
                    let vectors = numbers(n * width, 2);
                    let found = matrix.times(&vectors);
                    assert_eq!(found.len(), n * rows);
                    for (number, vector) in vectors.chunks(width).enumerate() {
                        for row in 0..rows {
                            let products = matrix.row(row).into_iter().zip(vector);
                            let exact: f64 = products.map(|(w, &x)| f64::from(w) * f64::from(x)).sum();
                            let found = f64::from(found[number * rows + row]);
                            assert!((found - exact).abs() < tolerance, "{found} {exact}, {rows} x {width}");
                        }
                    }
                    // However many vectors there are.
                    let first = matrix.times(&vectors[..width]);
                    assert_eq!(first, found[..rows]);
                }
            }
        }
    }

    #[test]
    fn rows_are_kept_and_rounded_as_libtorch_rounds() {
        let elements = [1.0, -0.1, 3.3e38, 1e-40, f32::INFINITY, f32::NAN, 1.003_906_2, 1.011_718_8, 0.5];
        for width in [1, 3, 9] {
            let rows = |matrix: &Matrix| -> Vec<f32> { (0..9 / width).flat_map(|row| matrix.row(row)).collect() };
            let bits = |numbers: Vec<f32>| -> Vec<u32> { numbers.into_iter().map(f32::to_bits).collect() };
            assert_eq!(bits(rows(&Matrix::float(&elements, width))), bits(elements.to_vec()));
            let found = rows(&Matrix::bf16(&elements, width));
            let tensor = tch::Tensor::from_slice(&elements).to_kind(tch::Kind::BFloat16).to_kind(tch::Kind::Float);
            for (found, expected) in found.iter().zip(Vec::<f32>::try_from(&tensor).unwrap()) {
                assert!(
                    found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(),
                    "{found} {expected}"
                );
            }
        }
    }
}
