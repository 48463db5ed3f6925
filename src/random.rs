//! Randomness without state: hashes of (seed, stream), so that whatever is drawn is a function of where it is drawn.

/// Mixes two numbers into one that looks random (splitmix64's finaliser, Steele et al. 2014, over each in turn).
pub fn mix(seed: u64, stream: u64) -> u64 {
    let finish = |z: u64| {
        let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    finish(finish(seed) ^ stream)
}
