//! Gathering from, and scattering to, lists of registered pieces.

use crate::mr_table::{AccessError, AccessFlags, MrTable, Pd};
use crate::work::Sge;

/// Sum of the lengths.
pub(crate) fn total_len(sges: &[Sge]) -> u64 {
    sges.iter().map(|sge| u64::from(sge.length)).sum()
}

/// Fills `dst` from the bytes at `byte_offset` of the list, which is long enough.
pub(super) fn gather(
    sges: &[Sge],
    byte_offset: u64,
    dst: &mut [u8],
    mem: &MrTable,
    pd: Pd,
) -> Result<(), AccessError> {
    let mut rest = dst;
    for piece in pieces(sges, byte_offset, rest.len()) {
        let slice = mem.check(
            piece.lkey,
            pd,
            piece.addr,
            piece.length.into(),
            AccessFlags::empty(),
        )?;
        let (part, behind) = rest.split_at_mut(slice.len());
        slice.copy_to(part);
        rest = behind;
    }
    debug_assert!(rest.is_empty(), "a message is as long as its list");
    Ok(())
}

/// Places `src` at `byte_offset` of the list, which is long enough.
pub(super) fn scatter(
    sges: &[Sge],
    byte_offset: u64,
    src: &[u8],
    mem: &MrTable,
    pd: Pd,
) -> Result<(), AccessError> {
    let mut rest = src;
    for piece in pieces(sges, byte_offset, rest.len()) {
        let access = AccessFlags::LOCAL_WRITE;
        let slice = mem.check(piece.lkey, pd, piece.addr, piece.length.into(), access)?;
        let (part, behind) = rest.split_at(slice.len());
        slice.copy_from(part);
        rest = behind;
    }
    debug_assert!(rest.is_empty(), "the caller checked the length of the list");
    Ok(())
}

/// The parts of the list that make up `len` bytes from `byte_offset`, empty ones left out.
fn pieces(sges: &[Sge], byte_offset: u64, len: usize) -> impl Iterator<Item = Sge> {
    let mut skip = byte_offset;
    let mut left = u32::try_from(len).expect("a packet is shorter than 4 GiB");
    sges.iter().filter_map(move |sge| {
        let skipped = u32::try_from(skip).unwrap_or(u32::MAX).min(sge.length);
        skip -= u64::from(skipped);
        let length = (sge.length - skipped).min(left);
        left -= length;
        let addr = sge.addr.wrapping_add(skipped.into());
        (length > 0).then_some(Sge {
            addr,
            length,
            lkey: sge.lkey,
        })
    })
}
