"""The other side of tests/kafka_python.rs: reads, writes and hashes with the package kafka-python.

  read FILE...     prints each record of segment files as a JSON line
  write DIR        writes a segment per codec that is available, prints [codec, record] lines
  murmur2          prints murmur2 of each hexadecimal line of standard input
"""

import json
import os
import random
import struct
import sys

from kafka import codec
from kafka.partitioner.default import murmur2
from kafka.record.default_records import DefaultRecordBatchBuilder
from kafka.record.memory_records import MemoryRecords

CODECS = [
    ("none", 0, lambda: True),
    ("gzip", 1, codec.has_gzip),
    ("snappy", 2, codec.has_snappy),
    ("lz4", 3, codec.has_lz4),
    ("zstd", 4, codec.has_zstd),
]


def text(value):
    return None if value is None else bytes(value).hex()


def line(offset, timestamp, key, value, headers):
    return {
        "offset": offset,
        "timestamp": timestamp,
        "key": text(key),
        "value": text(value),
        "headers": [[k.encode().hex(), text(v)] for k, v in headers],
    }


def read(paths):
    for path in paths:
        with open(path, "rb") as file:
            data = file.read()
        records = MemoryRecords(data)
        for batch in records:
            if not batch.validate_crc():
                sys.exit(f"{path}: CRC of the batch at offset {batch.base_offset} is wrong")
            for r in batch:
                print(json.dumps(line(r.offset, r.timestamp, r.key, r.value, r.headers)))
        if records.valid_bytes() != len(data):
            sys.exit(f"{path}: {records.valid_bytes()} of {len(data)} bytes are batches")


def some_records(rng):
    """Compressible and incompressible, absent and empty keys, values and headers."""
    for _ in range(rng.randrange(1, 60)):
        key = rng.choice([None, b"", b"N%05d" % rng.randrange(10**5)])
        value = rng.choice([None, b"", b"EWR,IAH,227," * rng.randrange(1, 200), rng.randbytes(900)])
        headers = [
            (rng.choice(["trace", "", "größe"]), rng.choice([None, b"", rng.randbytes(5)]))
            for _ in range(rng.choice([0, 0, 1, 3]))
        ]
        yield rng.randrange(1 << 41), key, value, headers


def write(directory):
    for name, number, is_available in CODECS:
        if not is_available():
            continue
        rng = random.Random(number)
        offset = 0
        with open(os.path.join(directory, f"{name}-{0:020}.log"), "wb") as file:
            for _ in range(20):
                builder = DefaultRecordBatchBuilder(2, number, False, -1, -1, -1, 1 << 24)
                base_offset = offset
                for delta, record in enumerate(some_records(rng)):
                    assert builder.append(delta, *record) is not None
                    print(json.dumps([name, line(offset, *record)]))
                    offset += 1
                batch = builder.build()
                struct.pack_into(">q", batch, 0, base_offset)
                file.write(batch)


def hash_lines():
    for key in sys.stdin:
        print(murmur2(bytes.fromhex(key.strip())) & 0xFFFFFFFF)


if __name__ == "__main__":
    command, arguments = sys.argv[1], sys.argv[2:]
    if command == "read":
        read(arguments)
    elif command == "write":
        write(*arguments)
    else:
        hash_lines()
