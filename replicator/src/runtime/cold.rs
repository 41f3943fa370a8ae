//! What images are filled with: bytes of segment files.

use std::path::Path;

use crate::follower::Fill;
use crate::image::{FilePlace, ImageId, ImageState, Mark};
use crate::record::BatchView;
use crate::segment::{BatchPosition, SegmentReader, list_segments};

/// Walks whole, valid batches of `bytes`, which begin at `from`; stops at the first that is not one, or
/// does not continue the offsets.
pub(super) fn walk(bytes: &[u8], from: Mark) -> Result<Mark, String> {
    let mut mark = from;
    let start = from.byte_position;
    loop {
        let at = (mark.byte_position - start) as usize;
        let Ok((batch, _)) = BatchView::parse(&bytes[at..]) else {
            return Ok(mark);
        };
        if batch.base_offset() != mark.end_offset {
            return Ok(mark);
        }
        batch
            .verify_crc()
            .map_err(|error| format!("the batch at offset {}: {error}", mark.end_offset))?;
        let len = u32::try_from(batch.len()).map_err(|_| "a batch is too long".to_owned())?;
        mark = mark.after(batch.stamped_bytes(), len, batch.next_offset());
    }
}

/// Bytes of a segment file that fit an image.
#[derive(Debug)]
pub(super) struct ColdBytes {
    pub(super) state: ImageState,
    pub(super) bytes: Vec<u8>,
}

/// Reads whole batches from the one that holds `offset` on: of one segment, as many as fit an image,
/// and none at or beyond `limit_offset`.
pub(super) fn read_cold(
    dir: &Path,
    id: ImageId,
    offset: i64,
    limit_offset: i64,
    image_len: u32,
) -> Result<ColdBytes, String> {
    let segments = list_segments(dir).map_err(|error| error.to_string())?;
    let Some(&segment) = segments.iter().rev().find(|base| **base <= offset) else {
        return Err(format!("offset {offset} is below the first segment"));
    };
    let reader = SegmentReader::open(dir, segment).map_err(|error| error.to_string())?;
    let found = reader
        .position_of(offset)
        .map_err(|error| error.to_string())?;
    let Some(BatchPosition {
        position,
        base_offset,
        ..
    }) = found
    else {
        return Err(format!(
            "offset {offset} is beyond the end of segment {segment}"
        ));
    };
    let mut bytes = vec![0; image_len as usize];
    let len = reader
        .read_at(position, &mut bytes)
        .map_err(|error| error.to_string())?;
    bytes.truncate(len);
    let place = FilePlace {
        segment_base_offset: segment,
        file_position: position,
    };
    let mut state = ImageState::new(id, base_offset, place, image_len);
    let mut at = 0;
    while let Ok((batch, _)) = BatchView::parse(&bytes[at..]) {
        if batch.base_offset() >= limit_offset || batch.base_offset() != state.end().end_offset {
            break;
        }
        let len = u32::try_from(batch.len()).map_err(|_| "a batch is too long".to_owned())?;
        state.push(batch.stamped_bytes(), len, batch.next_offset());
        at += batch.len();
    }
    if at == 0 {
        return Err(format!("no batch at byte {position} of segment {segment}"));
    }
    state.seal();
    bytes.truncate(at);
    Ok(ColdBytes { state, bytes })
}

/// Reads the bytes that a follower's image begins with.
pub(super) fn read_fill(dir: &Path, fill: &Fill) -> Result<(Vec<u8>, Mark), String> {
    let mut bytes = vec![0; fill.len as usize];
    if fill.len > 0 {
        let reader = SegmentReader::open(dir, fill.place.segment_base_offset)
            .map_err(|error| error.to_string())?;
        let len = reader
            .read_at(fill.place.file_position, &mut bytes)
            .map_err(|error| error.to_string())?;
        bytes.truncate(len);
    }
    let end = walk(&bytes, Mark::start(fill.base_offset))?;
    Ok((bytes, end))
}
