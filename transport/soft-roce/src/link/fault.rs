//! A link that loses, repeats, delays and damages packets, by the same seed always the same ones.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use super::{Link, LinkCounters, RxBuf, TxBuf};

/// How often each fault strikes, in packets of a thousand.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct FaultRates {
    /// The packet is not sent.
    pub loss: u16,
    /// The packet is sent twice.
    pub duplication: u16,
    /// The packet is held back until one to four later packets have gone.
    pub reordering: u16,
    /// One bit of the packet is flipped, so that its ICRC is wrong.
    pub corruption: u16,
}

/// Wraps a link and treats the packets it sends as a bad network would.
///
/// A packet is struck by one fault at most. Packets that are not damaged keep a right ICRC whatever
/// becomes of their neighbours. A packet held back leaves with a later [`send`](Link::send): if none
/// follows, it is lost.
#[derive(Debug)]
pub struct FaultLink<L> {
    inner: L,
    rates: FaultRates,
    random: SplitMix64,
    /// What goes out instead of the caller's packets.
    out: TxBuf,
    held: Vec<Held>,
}

/// A packet held back.
#[derive(Debug)]
struct Held {
    /// Packets that overtake this one from here on.
    overtakers: u64,
    to: IpAddr,
    udp_payload: Vec<u8>,
}

/// Packets held back at once, at most.
const HELD_MAX: usize = 16;

impl<L: Link> FaultLink<L> {
    /// Wraps `inner`; equal seeds strike equal packets.
    ///
    /// # Panics
    ///
    /// If the rates sum to more than a thousand.
    pub fn new(inner: L, rates: FaultRates, seed: u64) -> Self {
        let FaultRates {
            loss,
            duplication,
            reordering,
            corruption,
        } = rates;
        let sum = [loss, duplication, reordering, corruption]
            .map(u32::from)
            .iter()
            .sum::<u32>();
        assert!(
            sum <= 1000,
            "a packet has one fault at most, these rates sum to {sum} of 1000"
        );
        let out = TxBuf::new(inner.local_addr());
        Self {
            inner,
            rates,
            random: SplitMix64(seed),
            out,
            held: Vec::new(),
        }
    }

    fn treat(&mut self, to: IpAddr, packet: &[u8]) -> io::Result<()> {
        let FaultRates {
            loss,
            duplication,
            reordering,
            corruption,
        } = self.rates;
        let mut dice = self.random.below(1000);
        let mut strikes = |rate: u16| {
            let rate = u64::from(rate);
            let struck = dice < rate;
            dice = if struck { u64::MAX } else { dice - rate };
            struck
        };
        if strikes(loss) {
            return Ok(());
        }
        if strikes(duplication) {
            self.pass(to, packet)?;
        } else if strikes(reordering) && self.held.len() < HELD_MAX {
            let overtakers = 1 + self.random.below(4);
            self.held.push(Held {
                overtakers,
                to,
                udp_payload: packet.to_vec(),
            });
            return Ok(());
        } else if strikes(corruption) {
            self.pass(to, packet)?;
            self.damage_last();
            return self.release();
        }
        self.pass(to, packet)?;
        self.release()
    }

    /// Puts a packet among those that go out.
    fn pass(&mut self, to: IpAddr, packet: &[u8]) -> io::Result<()> {
        if self.out.is_full() {
            self.inner.send(&mut self.out)?;
        }
        self.out.push_built(to, packet);
        Ok(())
    }

    fn damage_last(&mut self) {
        let Some(packet) = self.out.last_packet_mut() else {
            return;
        };
        // Byte 4 of the BTH is outside the ICRC: damage there would not be seen.
        let bits = packet.len() as u64 * 8 - 8;
        let bit = self.random.below(bits);
        let bit = if bit < 32 { bit } else { bit + 8 };
        let byte = usize::try_from(bit / 8).expect("an index into the packet");
        packet[byte] ^= 1 << (bit % 8);
    }

    /// Lets go of the packets that have been overtaken often enough.
    fn release(&mut self) -> io::Result<()> {
        for held in &mut self.held {
            held.overtakers -= 1;
        }
        while let Some(ready) = self.held.iter().position(|held| held.overtakers == 0) {
            let Held {
                to, udp_payload, ..
            } = self.held.remove(ready);
            self.pass(to, &udp_payload)?;
        }
        Ok(())
    }
}

impl<L: Link> Link for FaultLink<L> {
    fn local_addr(&self) -> SocketAddr {
        self.inner.local_addr()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.inner.fd()
    }

    fn send(&mut self, tx: &mut TxBuf) -> io::Result<()> {
        let result = tx
            .packets()
            .try_for_each(|(to, packet)| self.treat(to, packet));
        tx.clear();
        result?;
        self.inner.send(&mut self.out)
    }

    fn recv(&mut self, rx: &mut RxBuf) -> io::Result<usize> {
        self.inner.recv(rx)
    }

    fn counters(&self) -> LinkCounters {
        self.inner.counters()
    }
}

/// A small generator whose sequence depends on its seed alone (Steele, Lea and Flood, 2014).
#[derive(Debug)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `bound`, which is small enough for the remainder's bias not to matter.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
