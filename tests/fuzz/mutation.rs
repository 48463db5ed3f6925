//! Random changes of valid inputs, and the limits for their reader: no panic, little memory, little time.

use std::time::{Duration, Instant};

use lockstep::random::mix;

use crate::memory;

/// Random numbers; all those of an input follow from its seed.
struct Random(u64, u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.1 += 1;
        (mix(self.0, self.1) % end.max(1) as u64) as usize
    }

    fn of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    fn range(&mut self, bytes: &[u8], longest: usize) -> std::ops::Range<usize> {
        let start = self.below(bytes.len() + 1);
        start..(start + self.below(longest + 1)).min(bytes.len())
    }

    /// Usually few repetitions, sometimes many.
    fn times(&mut self) -> usize {
        let doublings = if self.below(16) == 0 { 18 } else { 9 };
        1 << self.below(doublings)
    }
}

/// Text that readers of any format stumble over.
const WORDS: [&str; 30] = [
    "",
    "0",
    "-1",
    "1e999",
    "18446744073709551615",
    "9223372036854775808",
    "4294967296",
    "NaN",
    "null",
    "true",
    "[",
    "]",
    "{",
    "}",
    "\"",
    "\\",
    ",",
    ":",
    "\n",
    "\r\n",
    "\0",
    "../",
    "/etc/passwd",
    "\u{feff}",
    "\u{202e}",
    "&a ",
    "*a",
    "- ",
    "!!binary ",
    "é",
];
const NUMBERS: [u64; 10] = [0, 1, 127, 1 << 15, 1 << 31, u32::MAX as u64, 1 << 32, 1 << 53, 1 << 63, u64::MAX];

/// Changes an input in one to four places.
fn change(bytes: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut Random) {
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len());
        let digits: Vec<usize> = (0..bytes.len()).filter(|&i| bytes[i].is_ascii_digit()).collect();
        match random.below(12) {
            0 | 1 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            2 if !bytes.is_empty() => bytes[at] = random.below(256) as u8,
            3 => bytes.truncate(random.below(bytes.len() + 1)),
            4 => drop(bytes.drain(random.range(bytes, 64))),
            5 => {
                let from = random.of(corpus);
                let part = from[random.range(from, 200)].to_vec();
                drop(bytes.splice(random.range(bytes, 200), part));
            }
            6 => drop(bytes.splice(at..at, random.of(&WORDS).bytes())),
            // Deep nesting, long names, many entries.
            7 => {
                let part = bytes[random.range(bytes, 8)].repeat(random.times());
                drop(bytes.splice(at..at, part));
            }
            8 => {
                let part = random.of(&WORDS).repeat(random.times());
                drop(bytes.splice(at..at, part.into_bytes()));
            }
            9 => {
                let number = random.of(&NUMBERS).wrapping_add(random.below(3) as u64).wrapping_sub(1).to_le_bytes();
                let width = *random.of(&[2, 4, 8]);
                let end = bytes.len().min(at + width);
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            // Another number in a text.
            _ if !digits.is_empty() => {
                let start = *random.of(&digits);
                let end = (start..bytes.len()).find(|&i| !bytes[i].is_ascii_digit()).unwrap_or(bytes.len());
                let number = random.of(&NUMBERS).wrapping_add(random.below(3) as u64).wrapping_sub(1).to_string();
                drop(bytes.splice(start..end, number.into_bytes()));
            }
            _ => {}
        }
    }
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a whole number"))
}

/// How much memory reading may take: `factor` times the input, and `constant` bytes.
pub struct Limit {
    pub factor: usize,
    pub constant: usize,
}

/// Changes inputs of the corpus, `repair`s half of them, and gives each to `read`, which tells whether it accepted it.
pub fn fuzz(
    corpus: &[Vec<u8>],
    runs: u64,
    limit: &Limit,
    repair: impl Fn(&mut Vec<u8>),
    mut read: impl FnMut(&[u8]) -> bool,
) {
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let seed = from_environment("LOCKSTEP_FUZZ_SEED").unwrap_or(1);
    let runs = from_environment("LOCKSTEP_FUZZ_RUNS").unwrap_or(runs);
    let (mut taken, mut most, mut slowest, start) = (0, (0, 0), Duration::ZERO, Instant::now());
    for seed in (seed..).take(runs as usize) {
        let mut random = Random(seed, 0);
        let mut bytes = random.of(corpus).clone();
        change(&mut bytes, corpus, &mut random);
        if random.below(2) == 0 {
            repair(&mut bytes);
        }
        let again = Again { name: &name, seed };
        let began = Instant::now();
        let (took, peak) = memory::peak(|| read(&bytes));
        let allowed = limit.constant + limit.factor * bytes.len();
        assert!(peak <= allowed, "{peak} bytes of memory for an input of {}, {allowed} allowed", bytes.len());
        assert!(began.elapsed() < Duration::from_secs(60), "{:?} for {} bytes", began.elapsed(), bytes.len());
        std::mem::forget(again);
        taken += u64::from(took);
        most = most.max((peak, bytes.len()));
        slowest = slowest.max(began.elapsed());
    }
    let seconds = start.elapsed().as_secs_f64();
    let (peak, of) = (most.0 >> 10, most.1 >> 10);
    println!(
        "{name}: {runs} inputs in {seconds:.1} s, {taken} taken; at most {slowest:.1?}, and {peak} KiB of memory for {of} KiB"
    );
    assert!(runs < 100 || (0 < taken && taken < runs), "the changes are all too small or all too large");
}

/// Prints how to run an input again if it fails.
struct Again<'a> {
    name: &'a str,
    seed: u64,
}

impl Drop for Again<'_> {
    fn drop(&mut self) {
        let Self { name, seed } = self;
        eprintln!("again: LOCKSTEP_FUZZ_SEED={seed} LOCKSTEP_FUZZ_RUNS=1 cargo test --release --test fuzz {name}");
    }
}
