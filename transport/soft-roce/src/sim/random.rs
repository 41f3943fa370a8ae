//! Randomness that a seed replays.

/// SplitMix64 (Steele, Lea and Flood, 2014): enough for a schedule.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Another generator, whose use does not disturb this one.
    pub(super) fn fork(&mut self) -> Self {
        Self(self.next())
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).expect("below a usize")
    }

    pub(super) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    pub(super) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            out.extend_from_slice(&self.next().to_le_bytes());
        }
        out.truncate(len);
        out
    }

    /// Cuts `len` into up to `count_max` pieces, some of them empty.
    pub(super) fn cut(&mut self, len: usize, count_max: usize) -> Vec<usize> {
        let count = 1 + self.below(count_max);
        let mut ends: Vec<usize> = (1..count).map(|_| self.below(len + 1)).collect();
        ends.push(len);
        ends.sort_unstable();
        let mut start = 0;
        ends.iter()
            .map(|end| end - std::mem::replace(&mut start, *end))
            .collect()
    }
}
