//! The software device: owns queue pairs, queues and regions; the only loop.
