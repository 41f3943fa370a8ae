//! The demo's report: a table for a person, or JSON.

use serde::Serialize;

/// What the demo did and how fast.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) input: String,
    pub(crate) records: u64,
    /// Bytes of the lines, without line feeds.
    pub(crate) bytes: u64,
    pub(crate) partitions: u32,
    /// Distinct keys; `None` without a key column.
    pub(crate) keys: Option<usize>,
    pub(crate) followers: u32,
    pub(crate) acks: &'static str,
    /// From the first record until all were committed.
    pub(crate) append_seconds: f64,
    pub(crate) records_per_second: f64,
    pub(crate) append_mb_per_second: f64,
    /// Append to commit as the leader measured it.
    pub(crate) commit_latency_us: Option<Latency>,
    /// Until the consumer had everything, after the last commit.
    pub(crate) consumer_lag_seconds: f64,
    pub(crate) fetches: Vec<Fetch>,
    pub(crate) cpu: Vec<Cpu>,
    pub(crate) devices: Vec<Device>,
    pub(crate) data_dir: String,
    pub(crate) segments: Vec<String>,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
}

/// The whole log read once from one replica, and found identical.
#[derive(Debug, Serialize)]
pub(crate) struct Fetch {
    pub(crate) replica: String,
    pub(crate) records: u64,
    pub(crate) mb_per_second: f64,
}

/// CPU time from the first record until all were committed.
#[derive(Debug, Serialize)]
pub(crate) struct Cpu {
    pub(crate) process: String,
    pub(crate) seconds: f64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Device {
    pub(crate) process: String,
    pub(crate) device: String,
}

impl Report {
    /// The table.
    pub(crate) fn text(&self) -> String {
        let mut rows: Vec<(String, String)> = Vec::new();
        let mut row = |name: &str, value: String| rows.push((name.to_owned(), value));
        row("input", self.input.clone());
        let keys = self
            .keys
            .map(|keys| format!(", {keys} keys, each in order"))
            .unwrap_or_default();
        row(
            "records",
            format!("{} in {} partitions{keys}", self.records, self.partitions),
        );
        row(
            "replication",
            format!("1 leader, {} followers, acks {}", self.followers, self.acks),
        );
        row(
            "append",
            format!(
                "{:.0} records/s, {:.1} MB/s",
                self.records_per_second, self.append_mb_per_second
            ),
        );
        if let Some(latency) = self.commit_latency_us {
            row(
                "append to commit",
                format!(
                    "p50 {}, p99 {}, p99.9 {}",
                    microseconds(latency.p50),
                    microseconds(latency.p99),
                    microseconds(latency.p999)
                ),
            );
        }
        row(
            "consumer",
            format!(
                "had everything {} after the last commit",
                microseconds(self.consumer_lag_seconds * 1e6)
            ),
        );
        for fetch in &self.fetches {
            let value = format!(
                "{:.1} MB/s, {} records, identical bytes",
                fetch.mb_per_second, fetch.records
            );
            row(&format!("fetch from {}", fetch.replica), value);
        }
        for cpu in &self.cpu {
            row(
                &format!("CPU of {}", cpu.process),
                format!("{:.2} s while appending", cpu.seconds),
            );
        }
        for device in &self.devices {
            row(
                &format!("device of {}", device.process),
                device.device.clone(),
            );
        }
        row("data directory", self.data_dir.clone());
        for segment in &self.segments {
            row("segment", segment.clone());
        }
        let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        let table: String = rows
            .iter()
            .map(|(name, value)| format!("  {name:<width$}  {value}\n"))
            .collect();
        format!("The consumer got exactly the input, in order.\n\n{table}")
    }
}

fn microseconds(us: f64) -> String {
    match us {
        us if us < 1e3 => format!("{us:.1} us"),
        us if us < 1e6 => format!("{:.2} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_readable_units() {
        assert_eq!(microseconds(12.34), "12.3 us");
        assert_eq!(microseconds(1234.0), "1.23 ms");
        assert_eq!(microseconds(2_500_000.0), "2.50 s");
    }
}
