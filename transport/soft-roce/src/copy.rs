//! The one bulk-copy primitive for memory that peers, other threads and this device touch at once.
//!
//! Registered memory has no owner among threads: a peer's WRITE lands while the application reads,
//! and the "peer" may be this very process. A plain `memcpy` would be a data race, so everything that
//! touches such bytes, the device and the safe layer above it alike, goes through these functions.
//! Small copies are relaxed atomics, a word at a time; larger ones on x86-64 are a loop of vector
//! instructions in an assembly block, which the compiler neither splits, merges nor invents accesses
//! around.
//!
//! The loop is not `rep movsb`, which some CPUs run at a tenth of its speed or less when the destination
//! lies 1 to 31 bytes above the source modulo 4096. That is where payloads lie: page-aligned memory
//! on one side, a page-aligned packet with its headers in front on the other.
//!
//! A copy is not atomic as a whole and orders nothing: a reader may see any mixture of old and new
//! words. Publish with [`store_u64`] and observe with [`load_u64`], or carry a checksum.
//!
//! # Safety
//!
//! Callers pass raw pointers and promise that the range stays mapped (and writable, for the writing
//! functions) during the call, and that no Rust reference to any byte of it is live. Other threads
//! may access the range at the same time only through these functions, through atomics of the
//! standard library, or from outside the program (another process, a device).
#![allow(unsafe_code, reason = "touches memory that peers write")]

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Bytes that one turn of the vector loop copies.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const BLOCK_LEN: usize = 64;

/// Copies `src`, which nobody else touches, to the shared bytes at `dst`.
///
/// # Safety
///
/// `dst..dst + src.len()` is shared memory as the module describes, writable during the call, and
/// does not overlap `src`.
pub unsafe fn write_shared(dst: *mut u8, src: &[u8]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    let (dst, src) = {
        let (blocks, rest) = src.split_at(src.len() - src.len() % BLOCK_LEN);
        // SAFETY: the first bytes of the caller's range, and a live slice of the same length.
        unsafe { copy_blocks(dst, blocks.as_ptr(), blocks.len()) };
        (dst.wrapping_add(blocks.len()), rest)
    };
    // SAFETY: the caller's range, or what is left of it.
    unsafe { write_words(dst, src) }
}

/// Copies the shared bytes at `src` to `dst`, which nobody else touches.
///
/// # Safety
///
/// `src..src + dst.len()` is shared memory as the module describes, readable during the call, and
/// does not overlap `dst`.
pub unsafe fn read_shared(dst: &mut [u8], src: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    let (dst, src) = {
        let (blocks, rest) = dst.split_at_mut(dst.len() - dst.len() % BLOCK_LEN);
        // SAFETY: the first bytes of the caller's range, and a live slice of the same length.
        unsafe { copy_blocks(blocks.as_mut_ptr(), src, blocks.len()) };
        (rest, src.wrapping_add(blocks.len()))
    };
    // SAFETY: the caller's range, or what is left of it.
    unsafe { read_words(dst, src) }
}

/// Sets `len` shared bytes at `dst` to zero.
///
/// # Safety
///
/// `dst..dst + len` is shared memory as the module describes, writable during the call.
pub unsafe fn zero_shared(mut dst: *mut u8, mut len: usize) {
    const ZEROES: [u8; 4096] = [0; 4096];
    while len > 0 {
        let chunk = len.min(ZEROES.len());
        // SAFETY: `chunk` bytes at `dst` are inside the caller's range.
        unsafe { write_shared(dst, &ZEROES[..chunk]) };
        dst = dst.wrapping_add(chunk);
        len -= chunk;
    }
}

/// Reads the shared word at `address` in host byte order.
///
/// With [`Ordering::Acquire`] it pairs with a [`store_u64`] with [`Ordering::Release`]: bytes copied
/// before that store are visible after this load.
///
/// # Safety
///
/// `address` is a multiple of 8 and the 8 bytes are shared memory as the module describes.
#[must_use]
pub unsafe fn load_u64(address: *const u8, order: Ordering) -> u64 {
    // SAFETY: aligned and mapped as the caller promises.
    unsafe { AtomicU64::from_ptr(address.cast_mut().cast()) }.load(order)
}

/// Writes the shared word at `address` in host byte order; see [`load_u64`] for what it publishes.
///
/// # Safety
///
/// As [`load_u64`], and the bytes are writable.
pub unsafe fn store_u64(address: *mut u8, value: u64, order: Ordering) {
    // SAFETY: aligned, mapped and writable as the caller promises.
    unsafe { AtomicU64::from_ptr(address.cast()) }.store(value, order);
}

/// Adds `add` to the shared word at `address`, wrapping, and returns what it held before.
///
/// # Safety
///
/// As [`store_u64`].
pub unsafe fn fetch_add_u64(address: *mut u8, add: u64) -> u64 {
    // SAFETY: aligned, mapped and writable as the caller promises.
    unsafe { AtomicU64::from_ptr(address.cast()) }.fetch_add(add, Ordering::SeqCst)
}

/// Stores `swap` in the shared word at `address` if it holds `compare`; returns what it held before.
///
/// # Safety
///
/// As [`store_u64`].
pub unsafe fn compare_swap_u64(address: *mut u8, compare: u64, swap: u64) -> u64 {
    // SAFETY: aligned, mapped and writable as the caller promises.
    let word = unsafe { AtomicU64::from_ptr(address.cast()) };
    word.compare_exchange(compare, swap, Ordering::SeqCst, Ordering::SeqCst)
        .unwrap_or_else(|held| held)
}

/// Copies whole blocks, each loaded before it is stored.
///
/// # Safety
///
/// `len` is a multiple of [`BLOCK_LEN`]; `len` bytes are readable at `src`, writable at `dst`, and the
/// ranges do not overlap.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn copy_blocks(dst: *mut u8, src: *const u8, len: usize) {
    if len == 0 {
        return;
    }
    // SAFETY: `at` runs from 0 to `len` in steps of a block, so exactly the two ranges the caller
    // vouches for are touched. SSE2 is part of x86-64.
    unsafe {
        std::arch::asm!(
            "2:",
            // What payloads come from and go to is seldom in the cache, and the next payload is near.
            "prefetcht0 [{src} + {at} + 4096]",
            "prefetchw [{dst} + {at} + 2048]",
            "movups {a}, [{src} + {at}]",
            "movups {b}, [{src} + {at} + 16]",
            "movups {c}, [{src} + {at} + 32]",
            "movups {d}, [{src} + {at} + 48]",
            "movups [{dst} + {at}], {a}",
            "movups [{dst} + {at} + 16], {b}",
            "movups [{dst} + {at} + 32], {c}",
            "movups [{dst} + {at} + 48], {d}",
            "add {at}, 64",
            "cmp {at}, {len}",
            "jne 2b",
            src = in(reg) src,
            dst = in(reg) dst,
            len = in(reg) len,
            at = inout(reg) 0_usize => _,
            a = out(xmm_reg) _,
            b = out(xmm_reg) _,
            c = out(xmm_reg) _,
            d = out(xmm_reg) _,
            options(nostack)
        );
    }
}

/// # Safety
///
/// As [`write_shared`].
unsafe fn write_words(dst: *mut u8, src: &[u8]) {
    let head = dst.align_offset(8).min(src.len());
    let (head_bytes, rest) = src.split_at(head);
    // SAFETY: the first `head` bytes of the caller's range.
    unsafe { write_bytes(dst, head_bytes) };
    let mut at = dst.wrapping_add(head);
    let mut words = rest.chunks_exact(8);
    for word in &mut words {
        // SAFETY: `word` has 8 bytes; any alignment will do.
        let value = unsafe { word.as_ptr().cast::<u64>().read_unaligned() };
        // SAFETY: `at` is 8-byte aligned and 8 bytes of the caller's range are left.
        unsafe { store_u64(at, value, Ordering::Relaxed) };
        at = at.wrapping_add(8);
    }
    // SAFETY: the last bytes of the caller's range.
    unsafe { write_bytes(at, words.remainder()) };
}

/// # Safety
///
/// As [`read_shared`].
unsafe fn read_words(dst: &mut [u8], src: *const u8) {
    let head = src.align_offset(8).min(dst.len());
    let (head_bytes, rest) = dst.split_at_mut(head);
    // SAFETY: the first `head` bytes of the caller's range.
    unsafe { read_bytes(head_bytes, src) };
    let mut at = src.wrapping_add(head);
    let mut words = rest.chunks_exact_mut(8);
    for word in &mut words {
        // SAFETY: `at` is 8-byte aligned and 8 bytes of the caller's range are left.
        let value = unsafe { load_u64(at, Ordering::Relaxed) };
        // SAFETY: `word` has 8 bytes; any alignment will do.
        unsafe { word.as_mut_ptr().cast::<u64>().write_unaligned(value) };
        at = at.wrapping_add(8);
    }
    // SAFETY: the last bytes of the caller's range.
    unsafe { read_bytes(words.into_remainder(), at) };
}

/// # Safety
///
/// As [`write_shared`].
unsafe fn write_bytes(dst: *mut u8, src: &[u8]) {
    for (index, byte) in src.iter().enumerate() {
        // SAFETY: `index` is below the length the caller vouches for.
        unsafe { AtomicU8::from_ptr(dst.wrapping_add(index)) }.store(*byte, Ordering::Relaxed);
    }
}

/// # Safety
///
/// As [`read_shared`].
unsafe fn read_bytes(dst: &mut [u8], src: *const u8) {
    for (index, byte) in dst.iter_mut().enumerate() {
        let address = src.wrapping_add(index).cast_mut();
        // SAFETY: `index` is below the length the caller vouches for.
        *byte = unsafe { AtomicU8::from_ptr(address) }.load(Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every alignment of both sides and every length around the thresholds, with guard bytes.
    #[test]
    fn copies_exactly_the_range() {
        let lengths = (0..40).chain([63, 64, 65, 127, 128, 129, 4096]);
        for len in lengths {
            for shift in 0..8 {
                let private: Vec<u8> = (0..len + shift)
                    .map(|i| u8::try_from(i % 251).unwrap())
                    .collect();
                let src = &private[shift..];
                let mut shared = vec![0xa5u8; len + 24];
                let at = shared.as_mut_ptr().wrapping_add(8 + (7 - shift));
                // SAFETY: `at` has `len` bytes left in `shared`, which only this thread touches.
                unsafe { write_shared(at, src) };
                let mut back = vec![0u8; len];
                // SAFETY: as above.
                unsafe { read_shared(&mut back, at) };
                assert_eq!(back, src, "len {len} shift {shift}");
                let start = 8 + (7 - shift);
                assert!(shared[..start].iter().all(|b| *b == 0xa5));
                assert_eq!(&shared[start..start + len], src);
                assert!(shared[start + len..].iter().all(|b| *b == 0xa5));
            }
        }
    }

    #[test]
    fn zeroes_exactly_the_range() {
        let mut shared = vec![0xa5u8; 10_000];
        // SAFETY: 9000 bytes from the third are inside `shared`, which only this thread touches.
        unsafe { zero_shared(shared.as_mut_ptr().wrapping_add(3), 9000) };
        assert!(shared[..3].iter().all(|b| *b == 0xa5));
        assert!(shared[3..9003].iter().all(|b| *b == 0));
        assert!(shared[9003..].iter().all(|b| *b == 0xa5));
    }

    #[test]
    fn atomics_return_the_old_value() {
        let mut word = 7u64;
        let at = (&raw mut word).cast::<u8>();
        // SAFETY: `at` is an aligned word that only this thread touches.
        assert_eq!(unsafe { fetch_add_u64(at, u64::MAX) }, 7);
        // SAFETY: as above.
        assert_eq!(unsafe { compare_swap_u64(at, 5, 1) }, 6);
        // SAFETY: as above.
        assert_eq!(unsafe { compare_swap_u64(at, 6, 9) }, 6);
        // SAFETY: as above.
        assert_eq!(unsafe { load_u64(at, Ordering::Acquire) }, 9);
    }
}
