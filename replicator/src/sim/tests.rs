//! Seeds, run.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::faults::{ALL, Fault, OF_EXECUTION, inject};

/// Seeds that a plain `cargo test` runs.
const SEEDS: u64 = 50;

/// Runs a seed; a panic is a violation too.
fn judged(seed: u64, options: Options) -> Result<Stats, Violation> {
    catch_unwind(AssertUnwindSafe(|| run(seed, options)))
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
fn simulated_clusters_keep_every_promise() {
    let from = number_from_env("FARLOG_SEED").unwrap_or(0);
    let count = number_from_env("FARLOG_SEEDS").unwrap_or(SEEDS);
    let options = Options {
        disasters_min: number_from_env("FARLOG_DISASTERS").unwrap_or(0),
        is_by_packets: std::env::var_os("FARLOG_PACKETS").is_some(),
        is_traced: std::env::var_os("FARLOG_TRACE").is_some(),
    };
    let started = std::time::Instant::now();
    let mut total = Stats::default();
    for seed in from..from + count {
        match judged(seed, options) {
            Ok(stats) => total.add(&stats),
            Err(violation) => panic!(
                "seed {seed}: {violation}\nreplay it with\n  scripts/simulate cluster --from {seed} --seeds 1 --trace"
            ),
        }
    }
    let elapsed = started.elapsed().as_secs_f64();
    println!(
        "simulation: {count} seeds from {from}, {:.0} a second: {total}",
        count as f64 / elapsed
    );
}

/// What a seed does is the same each time; otherwise no failure could be replayed.
#[test]
fn a_seed_decides_everything() {
    for seed in 0..10 {
        let [once, again] =
            [(); 2].map(|()| judged(seed, Options::default()).map_err(|violation| violation.0));
        assert_eq!(format!("{once:?}"), format!("{again:?}"), "seed {seed}");
    }
}

/// Seeds within which each fault must be noticed.
const FAULT_SEEDS: u64 = 2000;
/// Seeds that have noticed some fault before: tried first, since a search takes minutes without optimisation.
const TELLING_SEEDS: [u64; 10] = [0, 17, 22, 23, 32, 66, 99, 148, 433, 946];

/// The checks bite: whatever rule is broken, some seed fails. `FARLOG_FAULT` names a single one.
#[test]
fn each_deliberate_fault_is_noticed() {
    let only = std::env::var("FARLOG_FAULT").ok();
    let is_wanted = |fault: &Fault| {
        only.as_ref()
            .is_none_or(|name| *name == format!("{fault:?}"))
    };
    for fault in ALL.into_iter().chain(OF_EXECUTION).filter(is_wanted) {
        let noticed = TELLING_SEEDS
            .into_iter()
            .chain(0..FAULT_SEEDS)
            .find_map(|seed| {
                let violation = inject(fault, || judged(seed, Options::default())).err()?;
                // Old bytes are there too while scans are unchecked: they alone must not be what is noticed.
                let is_of_its_own = fault != Fault::ScanUnchecked
                    || inject(Fault::RecycledNotZeroed, || {
                        judged(seed, Options::default())
                    })
                    .is_ok();
                is_of_its_own.then_some((seed, violation))
            });
        let (seed, violation) =
            noticed.unwrap_or_else(|| panic!("{fault:?} passed {FAULT_SEEDS} seeds unnoticed"));
        println!("{fault:?}: seed {seed}: {violation}");
    }
}
