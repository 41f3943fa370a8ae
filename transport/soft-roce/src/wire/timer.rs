//! Times that the wire and the verbs attributes give as codes.

/// RNR NAK timer code to units of 10 microseconds.
const RNR_TIMER: [u32; 32] = [
    65_536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1_024,
    1_536, 2_048, 3_072, 4_096, 6_144, 8_192, 12_288, 16_384, 24_576, 32_768, 49_152,
];

/// Nanoseconds a requester waits at least after an RNR NAK with this timer code (low five bits).
///
/// Code 0 is the longest wait, 655.36 ms; code 1 the shortest, 10 us.
pub const fn rnr_timer_ns(code: u8) -> u64 {
    RNR_TIMER[(code & 0x1f) as usize] as u64 * 10_000
}

/// Nanoseconds of the local ACK timeout attribute: 4.096 us * 2^`code` (low five bits).
///
/// `None` for code 0, which means that the timer never fires.
pub const fn ack_timeout_ns(code: u8) -> Option<u64> {
    match code & 0x1f {
        0 => None,
        exponent => Some(4_096 << exponent),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rnr_codes_are_the_specification_s() {
        assert_eq!(rnr_timer_ns(0), 655_360_000);
        assert_eq!(rnr_timer_ns(1), 10_000);
        assert_eq!(rnr_timer_ns(12), 640_000);
        assert_eq!(rnr_timer_ns(31), 491_520_000);
        assert!((1..31).all(|code| rnr_timer_ns(code) < rnr_timer_ns(code + 1)));
    }

    #[test]
    fn ack_timeout_doubles_and_zero_never_fires() {
        assert_eq!(ack_timeout_ns(0), None);
        assert_eq!(ack_timeout_ns(14), Some(67_108_864));
        assert_eq!(ack_timeout_ns(31), Some(8_796_093_022_208));
    }
}
