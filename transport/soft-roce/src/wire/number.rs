//! Packet sequence numbers and queue pair numbers: both 24 bits, and never interchangeable.

use std::fmt;
use std::ops::Add;

const MASK: u32 = 0x00ff_ffff;

/// A packet sequence number: 24 bits, compared modulo 2^24.
///
/// It has no `Ord`: being before is not transitive on a circle. Use [`Psn::distance`] and the claims
/// built on it; they are meaningful for numbers less than 2^23 apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Psn(u32);

impl Psn {
    /// Takes the low 24 bits of `value`.
    pub const fn new(value: u32) -> Self {
        Self(value & MASK)
    }

    /// The number, 0 to 2^24 - 1.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The number after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self::new(self.0 + 1)
    }

    /// The number before this one.
    #[must_use]
    pub const fn prev(self) -> Self {
        Self::new(self.0.wrapping_sub(1))
    }

    /// How far this number lies after `origin`: -2^23 to 2^23 - 1, negative if it lies before.
    pub const fn distance(self, origin: Self) -> i32 {
        (self.0.wrapping_sub(origin.0) << 8).cast_signed() >> 8
    }

    /// Whether this number comes before `other`.
    pub const fn is_before(self, other: Self) -> bool {
        self.distance(other) < 0
    }

    /// Whether this number comes after `other`.
    pub const fn is_after(self, other: Self) -> bool {
        self.distance(other) > 0
    }

    pub(super) const fn to_be_bytes(self) -> [u8; 3] {
        u24_to_be_bytes(self.0)
    }

    pub(super) const fn from_be_bytes(bytes: [u8; 3]) -> Self {
        Self(u24_from_be_bytes(bytes))
    }
}

impl Add<u32> for Psn {
    type Output = Self;

    fn add(self, packets: u32) -> Self {
        Self::new(self.0.wrapping_add(packets))
    }
}

impl fmt::Display for Psn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06x}", self.0)
    }
}

impl fmt::Debug for Psn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Psn({self})")
    }
}

/// A queue pair number: 24 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Qpn(u32);

impl Qpn {
    /// Takes the low 24 bits of `value`.
    pub const fn new(value: u32) -> Self {
        Self(value & MASK)
    }

    /// The number, 0 to 2^24 - 1.
    pub const fn get(self) -> u32 {
        self.0
    }

    pub(super) const fn to_be_bytes(self) -> [u8; 3] {
        u24_to_be_bytes(self.0)
    }

    pub(super) const fn from_be_bytes(bytes: [u8; 3]) -> Self {
        Self(u24_from_be_bytes(bytes))
    }
}

impl fmt::Display for Qpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06x}", self.0)
    }
}

impl fmt::Debug for Qpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Qpn({self})")
    }
}

/// The low 24 bits of `value`, big endian.
pub(super) const fn u24_to_be_bytes(value: u32) -> [u8; 3] {
    let [_, a, b, c] = value.to_be_bytes();
    [a, b, c]
}

pub(super) const fn u24_from_be_bytes([a, b, c]: [u8; 3]) -> u32 {
    u32::from_be_bytes([0, a, b, c])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn order_survives_the_wrap() {
        let last = Psn::new(MASK);
        assert_eq!(last.next(), Psn::new(0));
        assert_eq!(Psn::new(0).prev(), last);
        assert!(last.is_before(Psn::new(0)));
        assert!(Psn::new(2).is_after(last));
        assert_eq!(Psn::new(2).distance(last), 3);
        assert_eq!(last + 3, Psn::new(2));
    }

    #[test]
    fn half_the_space_away_counts_as_before() {
        let (a, b) = (Psn::new(0), Psn::new(1 << 23));
        assert_eq!(a.distance(b), -(1 << 23));
        assert_eq!(b.distance(a), -(1 << 23));
    }

    proptest! {
        #[test]
        fn distance_undoes_addition(start: u32, step in 0u32..(1 << 23)) {
            let start = Psn::new(start);
            let moved = start + step;
            prop_assert_eq!(moved.distance(start), step.cast_signed());
            prop_assert_eq!(start.distance(moved), -step.cast_signed());
        }
    }
}
