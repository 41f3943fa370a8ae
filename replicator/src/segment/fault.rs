//! A double of the file system that crashes or fails at a chosen step.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::storage::{Disk, OpenMode, Storage};

/// What happens at the chosen step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The process is killed: neither this step nor a later one happens. Of a write, half does.
    Crash,
    /// This step fails, later ones do not. Of a write, half happens.
    Fails(Errno),
    /// This step and all later ones fail.
    FailsForGood(Errno),
}

/// Changes real files, and remembers what a loss of power would leave of them: nothing but synced bytes
/// under synced names.
#[derive(Debug)]
pub(crate) struct FaultyStorage {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    steps_done: usize,
    fault: Option<(usize, Fault)>,
    next_file: u64,
    /// Which file has an inode now.
    files: HashMap<u64, u64>,
    /// What is on the device.
    contents: HashMap<u64, Vec<u8>>,
    names: BTreeMap<PathBuf, u64>,
}

impl FaultyStorage {
    /// All that is in `dir` counts as synced. The fault comes at step `at`, counted from 0.
    pub(crate) fn new(dir: &Path, fault: Option<(usize, Fault)>) -> Arc<Self> {
        let mut state = State {
            steps_done: 0,
            fault,
            next_file: 0,
            files: HashMap::new(),
            contents: HashMap::new(),
            names: BTreeMap::new(),
        };
        for path in paths(dir) {
            let id = state.identify(&File::open(&path).unwrap());
            state.contents.insert(id, fs::read(&path).unwrap());
            state.names.insert(path, id);
        }
        Arc::new(Self {
            state: Mutex::new(state),
        })
    }

    /// How many steps have been asked for.
    pub(crate) fn steps_done(&self) -> usize {
        self.state.lock().unwrap().steps_done
    }

    /// Sets the step, counted from now, at which a fault comes.
    pub(crate) fn fail_in(&self, steps: usize, fault: Fault) {
        let mut state = self.state.lock().unwrap();
        state.fault = Some((state.steps_done + steps, fault));
    }

    /// From here on the file system works again.
    pub(crate) fn heal(&self) {
        self.state.lock().unwrap().fault = None;
    }

    /// Leaves of `dir` what a loss of power would leave in the worst case.
    pub(crate) fn lose_power(&self, dir: &Path) {
        let state = self.state.lock().unwrap();
        for path in paths(dir) {
            fs::remove_file(path).unwrap();
        }
        for (path, id) in state.names.iter().filter(|(path, _)| path.starts_with(dir)) {
            fs::write(path, state.contents.get(id).map_or(&[][..], Vec::as_slice)).unwrap();
        }
    }

    /// Counts a step; says whether a fault comes at it.
    fn step(&self) -> Result<(), Errno> {
        let mut state = self.state.lock().unwrap();
        let step = state.steps_done;
        state.steps_done += 1;
        match state.fault {
            Some((at, Fault::Crash)) if step >= at => Err(Errno::INTR),
            Some((at, Fault::Fails(errno))) if step == at => Err(errno),
            Some((at, Fault::FailsForGood(errno))) if step >= at => Err(errno),
            _ => Ok(()),
        }
    }

    fn is_first_of_crash(&self) -> bool {
        let state = self.state.lock().unwrap();
        state
            .fault
            .is_some_and(|(at, _)| state.steps_done == at + 1)
    }
}

impl State {
    fn identify(&mut self, file: &File) -> u64 {
        let next = &mut self.next_file;
        *self
            .files
            .entry(file.metadata().unwrap().ino())
            .or_insert_with(|| {
                *next += 1;
                *next
            })
    }
}

fn paths(dir: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    all.filter(|path| path.is_file()).collect()
}

impl Storage for FaultyStorage {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<File> {
        // Opening what exists changes nothing.
        if mode != OpenMode::Existing {
            self.step()?;
        }
        let is_new = !path.exists();
        let file = Disk.open(path, mode)?;
        if is_new {
            let mut state = self.state.lock().unwrap();
            // The inode may have been another file's.
            state.files.remove(&file.metadata()?.ino());
            state.identify(&file);
        }
        Ok(file)
    }

    fn write_at(&self, file: &File, bytes: &[u8], position: u64) -> io::Result<()> {
        if let Err(errno) = self.step() {
            if self.is_first_of_crash() {
                Disk.write_at(file, &bytes[..bytes.len() / 2], position)?;
            }
            return Err(errno.into());
        }
        Disk.write_at(file, bytes, position)
    }

    fn set_len(&self, file: &File, len: u64) -> io::Result<()> {
        self.step()?;
        Disk.set_len(file, len)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.step()?;
        let len = usize::try_from(file.metadata()?.len()).unwrap();
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, 0)?;
        let mut state = self.state.lock().unwrap();
        let id = state.identify(file);
        state.contents.insert(id, bytes);
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        Disk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        Disk.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.step()?;
        let mut state = self.state.lock().unwrap();
        state.names.retain(|path, _| path.parent() != Some(dir));
        for path in paths(dir) {
            let id = state.identify(&File::open(&path)?);
            state.names.insert(path, id);
        }
        Ok(())
    }
}
