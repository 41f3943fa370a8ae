//! Numbers that a seed decides.

/// SplitMix64.
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A number of the range, small ones as often as large ones of ten times their size.
    pub(crate) fn between(&mut self, least: u64, most: u64) -> u64 {
        let magnitudes = (most / least).max(2).ilog2() + 1;
        let scale = least << self.below(magnitudes.into());
        (scale + self.below(scale)).min(most)
    }
}
