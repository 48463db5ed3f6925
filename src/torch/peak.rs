//! How fast a device multiplies large matrices: measured, and as NVIDIA's data sheets say.

use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::{libtorch, synchronize};

/// Measures the peak of this device in FLOP/s, as a square matrix product reaches it: the denominator of mfu. NaN if
/// the device has no memory for it. However slow the device is, it takes about a second.
pub fn measure_peak(device: Device, kind: Kind) -> f64 {
    // On a GPU a product that keeps all of it busy, and several before the wait, whose cost would show in one. A slow GPU
    // is busy with smaller ones, and would take a minute for the largest.
    let (smallest, largest, products, limit) =
        if device.is_cuda() { (512, 8192, 8, 0.4) } else { (1024, 1024, 1, 0.15) };
    let peak = measured(smallest, largest, products, Duration::from_secs_f64(limit), |n| product([n; 3], kind, device));
    if let Device::Cuda(index) = device {
        libtorch::forget_memory(index);
    }
    peak
}

/// Measures in FLOP/s how fast this device multiplies (m, k) by (k, n), in about a fifth of a second or two products. NaN if
/// it has no memory for them.
pub fn measure_product(sizes: [i64; 3], device: Device, kind: Kind) -> f64 {
    let Some(work) = product(sizes, kind, device) else { return f64::NAN };
    // The first also chooses a kernel.
    work(1);
    let start = Instant::now();
    let mut best = work(1);
    while start.elapsed() < Duration::from_millis(200) {
        best = best.min(work(1));
    }
    2.0 * sizes.iter().map(|&n| n as f64).product::<f64>() / best.as_secs_f64()
}

/// Multiplies an (m, k) by a (k, n) matrix so often, and returns how long that took; `None` if the device has no memory for
/// them.
fn product([m, k, n]: [i64; 3], kind: Kind, device: Device) -> Option<impl Fn(u32) -> Duration> {
    // Not equal ones: a GPU takes less power for numbers whose bits do not change, and runs faster than it ever trains.
    let matrix = |rows, columns| Tensor::f_randn([rows, columns], (kind, device)).ok();
    let (a, b, product) = (matrix(m, k)?, matrix(k, n)?, matrix(m, n)?);
    Some(move |times| {
        let start = Instant::now();
        for _ in 0..times {
            let _ = a.mm_out(&product, &b);
        }
        synchronize(device);
        start.elapsed()
    })
}

/// FLOP/s of the largest products, up to this size, that can be measured within the limit; sizes double. `make` gives what
/// multiplies matrices of a size, as [`product`] does.
fn measured<W: Fn(u32) -> Duration>(
    smallest: i64,
    largest: i64,
    products: u32,
    limit: Duration,
    make: impl Fn(i64) -> Option<W>,
) -> f64 {
    let Some(mut work) = make(smallest) else { return f64::NAN };
    let mut n = smallest;
    // The first of a size also chooses a kernel; the very first starts the library.
    work(products);
    let mut best = work(products);
    // The next size takes eight times as long, and is run twice.
    while n < largest && best * 16 < limit {
        let Some(larger) = make(2 * n) else { break };
        (n, work) = (2 * n, larger);
        work(products);
        best = work(products);
    }
    let mut spent = best;
    while spent < limit {
        let time = work(products);
        spent += time;
        best = best.min(time);
    }
    f64::from(products) * 2.0 * (n as f64).powi(3) / best.as_secs_f64()
}

/// Names of cards as the driver gives them, with the TFLOP/s of their data sheets: bf16 with fp32 sums and without
/// sparsity on tensor cores, and fp32. A name must fit to the letter: a card cut down or divided (MIG) has another.
const DATA_SHEETS: [(&str, f64, f64); 21] = [
    ("NVIDIA A10", 125.0, 31.2),
    ("NVIDIA A100-PCIE-40GB", 312.0, 19.5),
    ("NVIDIA A100-SXM4-40GB", 312.0, 19.5),
    ("NVIDIA A100 80GB PCIe", 312.0, 19.5),
    ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
    ("NVIDIA A30", 165.0, 10.3),
    ("NVIDIA A40", 149.7, 37.4),
    ("NVIDIA B200", 2250.0, f64::NAN),
    ("NVIDIA GH200 480GB", 989.0, 67.0),
    ("NVIDIA GeForce RTX 3090", 71.0, 35.6),
    ("NVIDIA GeForce RTX 4090", 165.0, 82.6),
    ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
    ("NVIDIA H100 80GB HBM3", 989.0, 67.0),
    ("NVIDIA H100 NVL", 835.0, 60.0),
    ("NVIDIA H100 PCIe", 756.0, 51.0),
    ("NVIDIA H200", 989.0, 67.0),
    ("NVIDIA L4", 121.0, 30.3),
    ("NVIDIA L40", 181.0, 90.5),
    ("NVIDIA L40S", 362.0, 91.6),
    ("NVIDIA RTX 6000 Ada Generation", 364.0, 91.1),
    ("NVIDIA RTX A6000", 154.8, 38.7),
];

/// The peak in FLOP/s that NVIDIA's data sheet gives a card of this name, without sparsity: in bf16 that of its tensor
/// cores, in fp32 (which LibTorch does not round to TF32) that of the others. `None` for a card that is not in the table.
fn data_sheet_peak(name: &str, kind: Kind) -> Option<f64> {
    let (_, bf16, fp32) = DATA_SHEETS.into_iter().find(|(card, ..)| *card == name)?;
    let tflops = match kind {
        Kind::BFloat16 => bf16,
        Kind::Float => fp32,
        _ => f64::NAN,
    };
    tflops.is_finite().then_some(tflops * 1e12)
}

/// A sentence that puts a GPU's measured peak beside its data sheet's; `None` for a CPU and for a card that is not known.
pub fn describe_peak(device: Device, kind: Kind, measured: f64) -> Option<String> {
    let Device::Cuda(index) = device else { return None };
    beside_data_sheet(&super::gpu(index).ok()?.name, kind, measured)
}

/// checks/gpu_speed.py reads the share from this sentence.
fn beside_data_sheet(name: &str, kind: Kind, measured: f64) -> Option<String> {
    let sheet = data_sheet_peak(name, kind).filter(|_| measured.is_finite())?;
    Some(format!(
        "{name} multiplies large matrices at {:.0} TFLOP/s, {:.1} % of its data sheet's {:.0}; mfu is a share of the former",
        measured / 1e12,
        100.0 * measured / sheet,
        sheet / 1e12
    ))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    type Log = RefCell<Vec<(i64, Duration)>>;

    /// A card that takes `seconds` for one product of size 1, and notes what it did.
    fn card(n: i64, seconds: f64, log: &Log) -> impl Fn(u32) -> Duration + '_ {
        move |times| {
            let time = Duration::from_secs_f64(seconds * f64::from(times) * (n as f64).powi(3));
            log.borrow_mut().push((n, time));
            time
        }
    }

    /// The sizes that were run, the seconds that they took together, and the FLOP/s.
    fn sizes(seconds: f64) -> (Vec<i64>, f64, f64) {
        let log = Log::default();
        let peak = measured(512, 8192, 8, Duration::from_millis(400), |n| Some(card(n, seconds, &log)));
        let all = log.into_inner();
        (all.iter().map(|(n, _)| *n).collect(), all.iter().map(|(_, time)| time.as_secs_f64()).sum(), peak)
    }

    #[test]
    fn a_slow_card_is_measured_with_small_products() {
        // 2 GFLOP/s: a product of 8,192 would take nine minutes.
        let per_unit = 2.0 / 4e10;
        let (log, seconds, peak) = sizes(per_unit);
        assert!(log.iter().all(|&n| n == 512), "{log:?}");
        assert!((peak / 4e10 - 1.0).abs() < 1e-6, "{peak}");
        assert!(seconds < 1.0, "{seconds}");
        let (log, seconds, _) = sizes(per_unit / 500.0);
        assert_eq!(log.last(), Some(&4096), "{log:?}");
        assert!(seconds < 1.0, "{seconds}");
    }

    #[test]
    fn a_device_without_memory_has_no_peak_and_a_small_one_has() {
        let limit = Duration::from_millis(50);
        assert!(measured(512, 8192, 8, limit, |_| None::<fn(u32) -> Duration>).is_nan());
        let log = Log::default();
        let little = |n| (n <= 1024).then(|| card(n, 1e-13, &log));
        assert!(measured(512, 8192, 1, limit, little) > 0.0);
        assert_eq!(log.borrow().last().map(|(n, _)| *n), Some(1024));
    }

    #[test]
    fn cards_are_known_by_their_full_names() {
        assert_eq!(data_sheet_peak("NVIDIA H100 80GB HBM3", Kind::BFloat16), Some(989e12));
        assert_eq!(data_sheet_peak("NVIDIA H100 80GB HBM3", Kind::Float), Some(67e12));
        assert_eq!(data_sheet_peak("NVIDIA B200", Kind::Float), None);
        assert_eq!(data_sheet_peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb", Kind::BFloat16), None);
        assert_eq!(data_sheet_peak("NVIDIA H100 80GB HBM3", Kind::Double), None);
        let said = beside_data_sheet("NVIDIA H200", Kind::BFloat16, 740e12).unwrap();
        assert!(said.contains("at 740 TFLOP/s, 74.8 % of its data sheet's 989;"), "{said}");
        assert_eq!(beside_data_sheet("NVIDIA H200", Kind::BFloat16, f64::NAN), None);
    }
}
