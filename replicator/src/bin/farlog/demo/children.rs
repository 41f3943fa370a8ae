//! The demo's processes: started, watched, ended by their pids.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::CliError;

/// How long a process may take to shut down before it is killed.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Lines of a dead process's log that are shown.
const LOG_LINES: usize = 5;

/// One process of the demo. Its standard input is a pipe whose end tells it to shut down, so that it
/// cannot outlive us.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    /// What its death means, for the report.
    loss: &'static str,
    log_path: PathBuf,
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Process {
    /// Starts this program again with `args`; its standard error goes to `log_path`.
    pub(crate) fn spawn(
        name: String,
        loss: &'static str,
        args: &[String],
        log_path: PathBuf,
    ) -> Result<(Self, ChildStdout), CliError> {
        let failed = |error| CliError::new(format!("cannot start {name}"), error);
        let log = File::create(&log_path).map_err(failed)?;
        let program = std::env::current_exe().map_err(failed)?;
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0) // Ctrl-C reaches us alone: we end the others
            .spawn()
            .map_err(failed)?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("standard output is piped");
        Ok((
            Self {
                name,
                loss,
                log_path,
                child,
                stdin,
            },
            stdout,
        ))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How the process died, if it did.
    fn death(&mut self) -> Option<CliError> {
        let status = self.child.try_wait().ok()??;
        let what = format!("{} (pid {})", self.name, self.child.id());
        let mut help = format!("{}\nthe other processes were ended", self.loss);
        let log = last_lines(&self.log_path);
        if !log.is_empty() {
            help += &format!("\nits log {} ends with:\n{log}", self.log_path.display());
        }
        Some(
            CliError::new(what, how_it_died(status))
                .help(help)
                .exit_code(CliError::CHILD_DIED),
        )
    }
}

fn how_it_died(status: ExitStatus) -> String {
    const NAMES: [(i32, &str); 8] = [
        (1, "SIGHUP"),
        (2, "SIGINT"),
        (3, "SIGQUIT"),
        (6, "SIGABRT"),
        (7, "SIGBUS: is shared memory full?"),
        (9, "SIGKILL"),
        (11, "SIGSEGV"),
        (15, "SIGTERM"),
    ];
    let Some(signal) = status.signal() else {
        return match status.code() {
            Some(code) => format!("it ended by itself with exit status {code}"),
            None => format!("it ended: {status}"),
        };
    };
    let name = NAMES.iter().find(|(number, _)| *number == signal);
    format!(
        "it was killed by signal {signal}{}",
        name.map(|(_, name)| format!(" ({name})"))
            .unwrap_or_default()
    )
}

fn last_lines(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().map(|line| format!("  {line}")).collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

/// All processes of the demo; dropping them ends them.
#[derive(Debug, Default)]
pub(crate) struct Processes(Vec<Process>);

impl Processes {
    pub(crate) fn push(&mut self, process: Process) {
        self.0.push(process);
    }

    /// Writes a line to the standard input of the process of that name.
    pub(crate) fn tell(&mut self, name: &str, line: &str) -> Result<(), CliError> {
        let process = self.0.iter_mut().find(|process| process.name == name);
        match process.and_then(|process| process.stdin.as_mut()) {
            Some(stdin) => writeln!(stdin, "{line}")
                .map_err(|error| CliError::new(format!("cannot tell {name}"), error)),
            None => Ok(()),
        }
    }

    /// The first process that died without being asked to.
    pub(crate) fn death(&mut self) -> Option<CliError> {
        self.0.iter_mut().find_map(Process::death)
    }

    /// As [`Processes::death`], giving a dying process a moment: what it did to us may show first.
    pub(crate) fn death_within(&mut self, timeout: Duration) -> Option<CliError> {
        let deadline = Instant::now() + timeout;
        loop {
            let death = self.death();
            if death.is_some() || Instant::now() >= deadline {
                return death;
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Tells all to shut down and waits; returns the names of those that had to be killed.
    pub(crate) fn end(&mut self) -> Vec<String> {
        self.0
            .iter_mut()
            .for_each(|process| drop(process.stdin.take()));
        let deadline = Instant::now() + SHUTDOWN_TIMEOUT;
        let mut killed = Vec::new();
        for mut process in self.0.drain(..) {
            while matches!(process.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                thread::sleep(POLL_INTERVAL);
            }
            if matches!(process.child.try_wait(), Ok(None)) {
                killed.push(format!("{} (pid {})", process.name, process.child.id()));
                let _ = process.child.kill(); // fails only if it has ended by now
                let _ = process.child.wait();
            }
        }
        killed
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        self.end();
    }
}

/// CPU time that a process has used so far, all its threads together.
pub(crate) fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses and may hold anything: utime and stime are
    // the 12th and 13th field behind it (proc(5)).
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    let per_second = rustix::param::clock_ticks_per_second();
    Some(Duration::from_millis(ticks * 1000 / per_second.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn killed_by(signal: i32) -> String {
        how_it_died(ExitStatus::from_raw(signal))
    }

    #[test]
    fn a_death_is_put_in_words() {
        assert_eq!(killed_by(9), "it was killed by signal 9 (SIGKILL)");
        assert_eq!(killed_by(40), "it was killed by signal 40");
        assert_eq!(killed_by(3 << 8), "it ended by itself with exit status 3");
    }

    #[test]
    fn our_own_cpu_time_grows() {
        let before = cpu_time(std::process::id()).unwrap();
        let started = Instant::now();
        while cpu_time(std::process::id()).unwrap() <= before {
            assert!(
                started.elapsed() < Duration::from_secs(20),
                "no CPU time was counted"
            );
        }
        assert_eq!(cpu_time(u32::MAX), None);
    }
}
