//! CPU time as criterion's measure.

use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use rustix::time::{ClockId, clock_gettime};

/// Measures the CPU time of the calling thread instead of elapsed time.
///
/// Right for what neither sleeps nor waits: preemption does not count, so a busy machine yields the
/// same figures as an idle one, save for shared caches.
#[derive(Debug, Clone, Copy)]
pub struct ThreadCpuTime;

/// Formats durations, of whatever clock.
static WALL_TIME: WallTime = WallTime;

impl Measurement for ThreadCpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        thread_cpu_time()
    }

    fn end(&self, start: Duration) -> Duration {
        thread_cpu_time() - start
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WALL_TIME.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WALL_TIME.formatter()
    }
}

fn thread_cpu_time() -> Duration {
    clock(ClockId::ThreadCPUTime)
}

/// Returns the CPU time that this process has used, all threads, in the kernel and outside.
pub fn process_cpu_time() -> Duration {
    clock(ClockId::ProcessCPUTime)
}

fn clock(id: ClockId) -> Duration {
    let now = clock_gettime(id);
    Duration::try_from(now).expect("CPU time is not negative")
}
