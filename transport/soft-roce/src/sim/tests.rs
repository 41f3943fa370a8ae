//! Seeds, run.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::faults;

/// Seeds that a plain `cargo test` runs.
const SEEDS: u64 = 100;

/// Runs a seed; a panic is a violation too.
fn judged(seed: u64) -> Result<Stats, Violation> {
    catch_unwind(AssertUnwindSafe(|| run(seed)))
        .unwrap_or_else(|_| Err(Violation("a panic, see above".into())))
}

fn number_from_env(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is a number, not {value:?}")),
    )
}

/// Runs `FARLOG_SEEDS` seeds from `FARLOG_SEED` on; see `scripts/simulate`.
#[test]
fn simulated_devices_keep_every_promise() {
    let from = number_from_env("FARLOG_SEED").unwrap_or(0);
    let count = number_from_env("FARLOG_SEEDS").unwrap_or(SEEDS);
    let started = std::time::Instant::now();
    let mut total = Stats::default();
    for seed in from..from + count {
        match judged(seed) {
            Ok(stats) => total.add(&stats),
            Err(violation) => panic!(
                "seed {seed}: {violation}\nreplay it with\n  scripts/simulate device --from {seed} --seeds 1"
            ),
        }
    }
    let elapsed = started.elapsed().as_secs_f64();
    println!(
        "simulation: {count} seeds from {from}, {:.0} a second: {total}",
        count as f64 / elapsed
    );
}

/// Seeds within which each fault must be noticed.
const FAULT_SEEDS: u64 = 60;

/// The checks bite: whatever promise the device breaks, some seed fails.
#[test]
fn each_deliberate_fault_is_noticed() {
    for fault in faults::ALL {
        let noticed = (0..FAULT_SEEDS).find_map(|seed| {
            let judged = faults::inject(fault, || judged(seed));
            judged.err().map(|violation| (seed, violation))
        });
        let (seed, violation) =
            noticed.unwrap_or_else(|| panic!("{fault:?} passed {FAULT_SEEDS} seeds unnoticed"));
        println!("{fault:?}: seed {seed}: {violation}");
    }
}
