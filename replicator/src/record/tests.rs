//! The batch codec against hostile bytes and against other implementations.

use super::*;
use proptest::prelude::*;

/// Everything a reader may call on untrusted bytes.
fn read_everything(bytes: &[u8]) -> usize {
    let mut records = 0;
    let mut rest = bytes;
    while let Ok((batch, behind)) = BatchView::parse(rest) {
        rest = behind;
        let _ = batch.verify_crc();
        let _ = batch.check_appendable(1 << 16);
        let Ok(body) = batch.decompress(1 << 16) else {
            continue;
        };
        let Ok(iter) = batch.records_from(&body) else {
            continue;
        };
        for record in iter.map_while(Result::ok) {
            records += 1 + record.headers().count();
            let _ = ControlRecord::from_key(record.key);
        }
    }
    records
}

fn one_batch() -> Vec<u8> {
    let mut builder = BatchBuilder::new(4096);
    let headers: [(&[u8], Option<&[u8]>); 3] =
        [(b"trace", Some(b"a")), (b"trace", Some(b"b")), (b"", None)];
    assert!(builder.append(1000, Some(b"key"), Some(b"value"), &headers));
    assert!(builder.append(900, None, Some(b""), &[]));
    assert!(builder.append(1100, Some(b""), None, &[]));
    builder.build().to_vec()
}

/// Sets header fields and makes the CRC right again.
fn with_header(bytes: &[u8], change: impl FnOnce(&mut BatchHeader)) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut header = BatchHeader::read(bytes.first_chunk().unwrap());
    change(&mut header);
    header.emit(bytes.first_chunk_mut().unwrap());
    header.crc = crc32c::crc32c(&bytes[CRC_RANGE_START..]);
    header.emit(bytes.first_chunk_mut().unwrap());
    bytes
}

fn parse(bytes: &[u8]) -> BatchView<'_> {
    BatchView::parse(bytes).unwrap().0
}

#[test]
fn what_is_written_is_read() {
    let bytes = one_batch();
    let (batch, rest) = BatchView::parse(&bytes).unwrap();
    assert!(rest.is_empty());
    assert_eq!(batch.check_appendable(0), Ok(()));
    assert_eq!((batch.base_offset(), batch.next_offset()), (0, 3));
    assert_eq!(
        (batch.header().base_timestamp, batch.max_timestamp()),
        (1000, 1100)
    );
    let records: Vec<_> = batch.records().unwrap().map(Result::unwrap).collect();
    assert_eq!(records.len(), 3);
    assert_eq!(
        (records[0].key, records[0].value),
        (Some(&b"key"[..]), Some(&b"value"[..]))
    );
    let headers: Vec<_> = records[0].headers().map(|h| (h.key, h.value)).collect();
    let expected: [(&[u8], Option<&[u8]>); 3] =
        [(b"trace", Some(b"a")), (b"trace", Some(b"b")), (b"", None)];
    assert_eq!(headers, expected, "a key that occurs twice is kept twice");
    assert_eq!((records[1].key, records[1].value), (None, Some(&b""[..])));
    assert_eq!((records[2].key, records[2].value), (Some(&b""[..]), None));
    assert_eq!(
        records.iter().map(|r| r.timestamp).collect::<Vec<_>>(),
        [1000, 900, 1100]
    );
}

#[test]
fn a_stamp_leaves_the_crc_valid() {
    let mut bytes = one_batch();
    stamp(&mut bytes, 1 << 40, 7);
    let batch = parse(&bytes);
    assert_eq!(batch.verify_crc(), Ok(()));
    assert_eq!(
        (batch.base_offset(), batch.partition_leader_epoch()),
        (1 << 40, 7)
    );
    assert_eq!(
        batch.records().unwrap().last().unwrap().unwrap().offset,
        (1 << 40) + 2
    );
}

#[test]
fn the_builder_stops_at_its_limit_and_starts_anew() {
    let mut builder = BatchBuilder::new(HEADER_LEN + 20);
    assert!(
        !builder.append(0, None, Some(&[0; 14]), &[]),
        "7 + 14 bytes do not fit 20"
    );
    assert!(builder.is_empty());
    assert!(builder.append(5, None, Some(&[0; 13]), &[]));
    assert_eq!(builder.len(), HEADER_LEN + 20);
    assert!(!builder.append(5, None, None, &[]));
    let first = builder.build().to_vec();
    builder.clear();
    assert!(builder.append(5, None, Some(&[0; 13]), &[]));
    assert_eq!(builder.build(), first);
}

/// Header fields that would make a careless reader allocate or run off the end.
#[test]
fn hostile_headers_are_refused() {
    let good = one_batch();
    let most = (good.len() - HEADER_LEN) / 7;
    let count = with_header(&good, |h| {
        h.records_count = i32::MAX;
        h.last_offset_delta = i32::MAX - 1;
    });
    let error = BatchError::RecordsCount {
        records_count: i32::MAX,
        most,
    };
    assert_eq!(parse(&count).records().unwrap_err(), error);
    let refused =
        |change: fn(&mut BatchHeader)| BatchView::parse(&with_header(&good, change)).unwrap_err();
    assert_eq!(
        refused(|h| h.records_count = i32::MAX),
        BatchError::RecordsCount {
            records_count: i32::MAX,
            most: 3
        }
    );
    assert_eq!(
        refused(|h| h.records_count = -1),
        BatchError::RecordsCount {
            records_count: -1,
            most: 3
        }
    );
    assert_eq!(
        refused(|h| h.batch_length = 48),
        BatchError::Length { batch_length: 48 }
    );
    assert_eq!(
        refused(|h| h.batch_length = -1),
        BatchError::Length { batch_length: -1 }
    );
    assert_eq!(
        refused(|h| h.batch_length = i32::MAX),
        BatchError::Incomplete {
            needed: 12 + i32::MAX as usize,
            available: good.len()
        }
    );
    assert_eq!(refused(|h| h.magic = 1), BatchError::Magic { magic: 1 });
    for (base_offset, last_offset_delta) in [(-1, 2), (0, -1), (i64::MAX - 2, 2)] {
        let bytes = with_header(&good, |h| {
            h.base_offset = base_offset;
            h.last_offset_delta = last_offset_delta;
        });
        let error = BatchError::Offsets {
            base_offset,
            last_offset_delta,
        };
        assert_eq!(BatchView::parse(&bytes).unwrap_err(), error);
    }
}

#[test]
fn hostile_records_are_refused() {
    let record = |body: &[u8]| {
        let mut bytes = one_batch();
        bytes.truncate(HEADER_LEN);
        bytes.extend_from_slice(body);
        let batch_length = i32::try_from(bytes.len() - BATCH_LEN_PREFIX).unwrap();
        let bytes = with_header(&bytes, |h| {
            h.batch_length = batch_length;
            h.records_count = 1;
        });
        match parse(&bytes).records().unwrap().find_map(Result::err) {
            Some(BatchError::Record { index, cause }) => Some((index, cause)),
            None => None,
            other => panic!("{other:?}"),
        }
    };
    // length, attributes, timestamp delta, offset delta, key, value, header count
    assert_eq!(record(&[12, 0, 0, 0, 1, 1, 0]), None);
    assert_eq!(
        record(&[14, 0, 0, 0, 1, 1, 0]),
        Some((0, RecordFault::CutOff))
    );
    assert_eq!(
        record(&[14, 0, 0, 0, 1, 1, 0, 9]),
        Some((0, RecordFault::Size))
    );
    assert_eq!(
        record(&[12, 0, 0, 0, 1, 1, 0, 9]),
        Some((1, RecordFault::TrailingBytes))
    );
    assert_eq!(
        record(&[1, 0, 0, 0, 1, 1, 0]),
        Some((0, RecordFault::Length))
    );
    assert_eq!(
        record(&[12, 0, 0, 0, 3, 1, 0]),
        Some((0, RecordFault::Length))
    );
    assert_eq!(
        record(&[12, 0, 0, 0, 1, 1, 1]),
        Some((0, RecordFault::Length))
    );
    assert_eq!(
        record(&[12, 0, 0, 6, 1, 1, 0]),
        Some((0, RecordFault::OffsetDelta))
    );
    assert_eq!(
        record(&[12, 0, 0, 1, 1, 1, 0]),
        Some((0, RecordFault::OffsetDelta))
    );
    // i32::MAX headers, and a null header key.
    let headers = record(&[20, 0, 0, 0, 1, 1, 0xfe, 0xff, 0xff, 0xff, 0x0f]);
    assert_eq!(headers, Some((0, RecordFault::CutOff)));
    assert_eq!(
        record(&[16, 0, 0, 0, 1, 1, 2, 1, 1]),
        Some((0, RecordFault::Length))
    );
}

#[test]
fn a_gap_in_a_new_batch_is_refused() {
    let good = one_batch();
    let gap = with_header(&good, |h| h.last_offset_delta = 3);
    assert_eq!(
        parse(&gap).check_appendable(0),
        Err(BatchError::RecordsCount {
            records_count: 3,
            most: 4
        })
    );
    let mut flipped = good;
    *flipped.last_mut().unwrap() ^= 1;
    assert!(matches!(
        parse(&flipped).check_appendable(0),
        Err(BatchError::Crc { .. })
    ));
}

#[test]
fn kinds_of_batches_show() {
    let bytes = with_header(&one_batch(), |h| {
        h.attributes = Attributes(Attributes::TRANSACTIONAL | Attributes::CONTROL | 1 << 3);
        h.max_timestamp = 77;
    });
    let batch = parse(&bytes);
    assert!(batch.attributes().is_transactional() && batch.attributes().is_control());
    assert_eq!(batch.timestamp_type(), TimestampType::LogAppendTime);
    assert!(batch.records().unwrap().all(|r| r.unwrap().timestamp == 77));
    let codec = with_header(&bytes, |h| h.attributes = Attributes(5));
    assert_eq!(
        parse(&codec).records().unwrap_err(),
        BatchError::UnknownCodec { codec: 5 }
    );
}

prop_compose! {
    fn any_record()(
        timestamp: i64,
        key in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..20)),
        value in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..200)),
        headers in proptest::collection::vec(
            (
                proptest::collection::vec(any::<u8>(), 0..4),
                proptest::option::of(proptest::collection::vec(any::<u8>(), 0..9)),
            ),
            0..4,
        ),
    ) -> AnyRecord {
        AnyRecord { timestamp, key, value, headers }
    }
}

#[derive(Debug, Clone, PartialEq)]
struct AnyRecord {
    timestamp: i64,
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: Vec<(Vec<u8>, Option<Vec<u8>>)>,
}

impl AnyRecord {
    fn headers(&self) -> Vec<(&[u8], Option<&[u8]>)> {
        let headers = self.headers.iter();
        headers.map(|(k, v)| (k.as_slice(), v.as_deref())).collect()
    }

    fn append_to(&self, builder: &mut BatchBuilder) -> bool {
        let (key, value) = (self.key.as_deref(), self.value.as_deref());
        builder.append(self.timestamp, key, value, &self.headers())
    }

    fn append_in_place(&self, builder: &mut InPlaceBuilder, bytes: &mut Vec<u8>) -> bool {
        let (key, value) = (self.key.as_deref(), self.value.as_deref());
        let put = |piece: &[u8]| bytes.extend_from_slice(piece);
        builder.append(self.timestamp, key, value, &self.headers(), put)
    }

    fn of(record: &Record<'_>) -> Self {
        Self {
            timestamp: record.timestamp,
            key: record.key.map(<[u8]>::to_vec),
            value: record.value.map(<[u8]>::to_vec),
            headers: record
                .headers()
                .map(|h| (h.key.to_vec(), h.value.map(<[u8]>::to_vec)))
                .collect(),
        }
    }
}

proptest! {
    #[test]
    fn round_trip(records in proptest::collection::vec(any_record(), 1..30)) {
        let mut builder = BatchBuilder::new(1 << 20);
        for record in &records {
            prop_assert!(record.append_to(&mut builder));
        }
        let bytes = builder.build();
        let (batch, rest) = BatchView::parse(bytes).unwrap();
        prop_assert!(rest.is_empty());
        prop_assert_eq!(batch.check_appendable(0), Ok(()));
        prop_assert_eq!(batch.max_timestamp(), records.iter().map(|r| r.timestamp).max().unwrap());
        let read: Vec<_> =
            batch.records().unwrap().map(|r| AnyRecord::of(&r.unwrap())).collect();
        prop_assert_eq!(read, records);
    }

    #[test]
    fn a_batch_built_in_place_is_the_same(records in proptest::collection::vec(any_record(), 1..30)) {
        let mut builder = BatchBuilder::new(2000);
        let mut in_place = InPlaceBuilder::new(2000);
        let mut bytes = vec![0; HEADER_LEN];
        for record in &records {
            let is_in = record.append_in_place(&mut in_place, &mut bytes);
            prop_assert_eq!(is_in, record.append_to(&mut builder));
        }
        prop_assert_eq!(in_place.is_empty(), builder.is_empty());
        if !builder.is_empty() {
            bytes[..HEADER_LEN].copy_from_slice(&in_place.header());
            prop_assert_eq!((in_place.len(), in_place.records_count()), (builder.len(), builder.records_count()));
            prop_assert_eq!(&bytes[..], builder.build());
        }
    }

    #[test]
    fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        read_everything(&bytes);
    }

    /// A good header in front of any body, under every codec number.
    #[test]
    fn any_body_is_read_without_panic(
        body in proptest::collection::vec(any::<u8>(), 0..300),
        codec in 0u16..8,
        records_count in 0i32..40,
    ) {
        let mut bytes = one_batch();
        bytes.truncate(HEADER_LEN);
        bytes.extend_from_slice(&body);
        let batch_length = i32::try_from(bytes.len() - BATCH_LEN_PREFIX).unwrap();
        let bytes = with_header(&bytes, |h| {
            h.attributes = Attributes(codec);
            h.batch_length = batch_length;
            h.last_offset_delta = 40;
            h.records_count = records_count;
        });
        read_everything(&bytes);
    }

    #[test]
    fn any_flipped_bit_is_noticed(at in 0usize..1000, bit in 0u8..8) {
        let good = one_batch();
        let mut bytes = good.clone();
        let at = CRC_RANGE_START + at % (good.len() - CRC_RANGE_START);
        bytes[at] ^= 1 << bit;
        match BatchView::parse(&bytes) {
            Ok((batch, _)) => {
                let crc_differs = matches!(batch.verify_crc(), Err(BatchError::Crc { .. }));
                prop_assert!(crc_differs);
            }
            Err(error) => prop_assert!(at < HEADER_LEN, "{}", error),
        }
        read_everything(&bytes);
    }
}
