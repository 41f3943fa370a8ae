//! How many packets may be unanswered: slow start, then additive increase, and from one packet after a
//! loss, fast to half of what it was and slowly beyond.
//!
//! RoCE has no congestion window of its own; hardware relies on a lossless fabric. Here the fabric
//! is a socket buffer at the other end, shared by all its queue pairs, which holds some 25 packets
//! of 4 KiB unless the peer enlarged it. Go-back-N answers every overflow with a burst, so starting
//! beyond that buffer never settles.

/// Packets that may be unanswered at first.
pub(super) const WINDOW_START: u32 = 16;

const WINDOW_MIN: u32 = 1;

/// A congestion window in packets.
#[derive(Debug)]
pub(super) struct Window {
    size: u32,
    slow_start_until: u32,
    /// Packets acknowledged since `size` last grew by one.
    credit: u32,
    max: u32,
}

impl Window {
    pub(super) fn new(max: u32) -> Self {
        let max = max.max(WINDOW_MIN);
        Window {
            size: WINDOW_START.min(max),
            slow_start_until: max,
            credit: 0,
            max,
        }
    }

    /// Packets that may be unanswered now.
    pub(super) fn size(&self) -> u32 {
        self.size
    }

    /// Caps the window, now and later.
    pub(super) fn set_max(&mut self, max: u32) {
        self.max = max.max(WINDOW_MIN);
        self.size = self.size.min(self.max);
    }

    /// `packets` were acknowledged while `in_flight` were unanswered.
    ///
    /// A window that was not used says nothing about the path, so it does not grow.
    pub(super) fn acknowledged(&mut self, packets: u32, in_flight: u32) {
        if in_flight * 2 < self.size {
            return;
        }
        if self.size < self.slow_start_until {
            self.size += packets.min(self.size);
        } else {
            self.credit += packets;
            let grown = self.credit / self.size;
            self.credit -= grown * self.size;
            self.size += grown;
        }
        self.size = self.size.min(self.max);
    }

    /// A packet was lost.
    ///
    /// What was sent behind it fills the buffers for nothing, and is about to be sent again. So this
    /// starts with a single packet, whose answer tells that they have drained: a responder reports a
    /// gap once, and the loss of the packet that should close it is noticed by the timer alone.
    pub(super) fn lost(&mut self) {
        self.slow_start_until = (self.size / 2).max(WINDOW_MIN);
        self.size = WINDOW_MIN;
        self.credit = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_fast_then_slowly_and_shrinks_on_loss() {
        let mut window = Window::new(128);
        assert_eq!(window.size(), WINDOW_START);
        window.acknowledged(16, 16);
        assert_eq!(window.size(), 32, "slow start doubles");
        window.lost();
        assert_eq!(window.size(), WINDOW_MIN);
        for in_flight in [1, 2, 4, 8] {
            window.acknowledged(in_flight, in_flight);
        }
        assert_eq!(window.size(), 16, "half of where it was lost, soon");
        window.acknowledged(15, 16);
        assert_eq!(window.size(), 16);
        window.acknowledged(1, 16);
        assert_eq!(window.size(), 17, "then one packet per window");
        window.set_max(8);
        for _ in 0..100 {
            window.acknowledged(8, 8);
        }
        assert_eq!(window.size(), 8);
    }

    #[test]
    fn an_idle_window_does_not_grow() {
        let mut window = Window::new(128);
        for _ in 0..100 {
            window.acknowledged(1, 1);
        }
        assert_eq!(window.size(), WINDOW_START);
    }
}
