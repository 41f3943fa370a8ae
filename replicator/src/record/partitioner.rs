//! Which partition a keyed record belongs to, as Kafka's default partitioner decides it.

/// Hashes `data` with MurmurHash2, 32 bits, little endian, with Kafka's seed.
///
/// # References
///
/// Austin Appleby, MurmurHash2; `org.apache.kafka.common.utils.Utils.murmur2`.
pub fn murmur2(data: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const M: u32 = 0x5bd1_e995;
    const R: u32 = 24;

    // Kafka's length is a Java int; a key longer than that cannot exist.
    #[expect(clippy::cast_possible_truncation, reason = "the hash is modulo 2^32")]
    let mut hash = SEED ^ data.len() as u32;
    let (words, tail) = data.as_chunks::<4>();
    for word in words {
        let mut k = u32::from_le_bytes(*word).wrapping_mul(M);
        k ^= k >> R;
        hash = hash.wrapping_mul(M) ^ k.wrapping_mul(M);
    }
    if !tail.is_empty() {
        let mut last = [0; 4];
        last[..tail.len()].copy_from_slice(tail);
        hash = (hash ^ u32::from_le_bytes(last)).wrapping_mul(M);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(M);
    hash ^ (hash >> 15)
}

/// Returns the partition of a record with this key, less than `partitions_count`.
///
/// # Panics
///
/// If `partitions_count` is 0: a topic has at least one partition.
pub fn partition_for_key(key: &[u8], partitions_count: u32) -> u32 {
    assert!(partitions_count > 0, "a topic has at least one partition");
    // Kafka's toPositive: the sign bit of a Java int is cleared.
    (murmur2(key) & 0x7fff_ffff) % partitions_count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_of_kafka() {
        // Values of Kafka's own tests, as signed Java ints.
        for (key, hash) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            (
                "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8",
                -58_897_971,
            ),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(key.as_bytes()).cast_signed(), hash, "{key}");
        }
    }
}
