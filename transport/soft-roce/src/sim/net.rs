//! The network of a simulation: packets on their way, and what befalls them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::net::SocketAddr;

use super::random::Rng;
use crate::link::Frame;
use crate::wire::icrc::Flow;
use crate::wire::{Bth, ROCE_PORT};

/// How often each fault strikes, in packets of a hundred, and how long packets travel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weather {
    pub(super) loss: usize,
    pub(super) duplication: usize,
    pub(super) corruption: usize,
    /// Packets held back, for up to `delay_ns_max`: later ones overtake them.
    pub(super) delay: usize,
    pub(super) delay_ns_max: u64,
    pub(super) latency_ns: u64,
}

/// What befell packets so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Strikes {
    pub(super) packets: u64,
    pub(super) lost: u64,
    pub(super) repeated: u64,
    pub(super) damaged: u64,
    pub(super) delayed: u64,
}

impl Strikes {
    pub(super) fn add(&mut self, other: &Self) {
        self.packets += other.packets;
        self.lost += other.lost;
        self.repeated += other.repeated;
        self.damaged += other.damaged;
        self.delayed += other.delayed;
    }
}

impl fmt::Display for Strikes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            packets,
            lost,
            repeated,
            damaged,
            delayed,
        } = self;
        write!(
            f,
            "{packets} packets, {lost} lost, {repeated} repeated, {damaged} damaged, {delayed} delayed"
        )
    }
}

/// Packets on their way.
pub(super) struct Net {
    weather: Weather,
    rng: Rng,
    flights: BinaryHeap<Reverse<Flight>>,
    launched: u64,
    pub(super) strikes: Strikes,
}

struct Flight {
    due: u64,
    /// Breaks ties in the order of sending.
    number: u64,
    frame: Frame,
}

impl Net {
    pub(super) fn new(weather: Weather, rng: Rng) -> Self {
        Self {
            weather,
            rng,
            flights: BinaryHeap::new(),
            launched: 0,
            strikes: Strikes::default(),
        }
    }

    /// Takes in a packet that was sent at `now`.
    pub(super) fn send(&mut self, now: u64, mut frame: Frame) {
        let Weather {
            loss,
            duplication,
            corruption,
            delay,
            delay_ns_max,
            latency_ns,
        } = self.weather;
        self.strikes.packets += 1;
        let mut due = now + latency_ns;
        if self.rng.chance(loss) {
            self.strikes.lost += 1;
            return;
        }
        // A queue pair for datagrams remembers none: one that the network repeats it delivers twice.
        if self.rng.chance(duplication) && !is_datagram(&frame) {
            self.strikes.repeated += 1;
            let later = due + self.rng.next() % delay_ns_max;
            self.launch(later, frame.clone());
        }
        if self.rng.chance(corruption) {
            self.strikes.damaged += 1;
            self.damage(&mut frame);
        }
        if self.rng.chance(delay) {
            self.strikes.delayed += 1;
            due += self.rng.next() % delay_ns_max;
        }
        self.launch(due, frame);
    }

    /// From now on every packet arrives.
    pub(super) fn calm(&mut self) {
        self.weather = Weather {
            loss: 0,
            duplication: 0,
            corruption: 0,
            delay: 0,
            ..self.weather
        };
    }

    /// When the next packet arrives.
    pub(super) fn next_arrival(&self) -> Option<u64> {
        self.flights.peek().map(|Reverse(flight)| flight.due)
    }

    /// Takes the next packet that has arrived by `now`.
    pub(super) fn pop_arrived(&mut self, now: u64) -> Option<Frame> {
        if self.next_arrival()? > now {
            return None;
        }
        self.flights.pop().map(|Reverse(flight)| flight.frame)
    }

    fn launch(&mut self, due: u64, frame: Frame) {
        self.launched += 1;
        let number = self.launched;
        self.flights.push(Reverse(Flight { due, number, frame }));
    }

    /// Flips one bit.
    ///
    /// A receiver that does not know the identification has a 16-bit check left, which one flip in
    /// 65,536 passes (see [`icrc`](crate::wire::icrc)). That is a limit of sockets and no fault of
    /// the device, so such a flip is drawn again. The byte of congestion marks is outside the ICRC.
    fn damage(&mut self, frame: &mut Frame) {
        const MARKS: usize = 4;
        let [src, dst] = [frame.src, frame.dst].map(|ip| SocketAddr::new(ip, ROCE_PORT));
        let flow = Flow::new(src, dst);
        let bytes = &mut frame.udp_payload;
        assert!(bytes.len() > Bth::LEN, "devices send whole packets");
        loop {
            let (byte, bit) = (self.rng.below(bytes.len()), self.rng.below(8));
            bytes[byte] ^= 1 << bit;
            if byte == MARKS || flow.verify(0, bytes).is_none() {
                return;
            }
            bytes[byte] ^= 1 << bit;
        }
    }
}

fn is_datagram(frame: &Frame) -> bool {
    const UNRELIABLE_DATAGRAM: u8 = 0b011;
    frame.udp_payload[0] >> 5 == UNRELIABLE_DATAGRAM
}

impl Ord for Flight {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

impl PartialOrd for Flight {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Flight {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Flight {}
