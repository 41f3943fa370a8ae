//! Every change to a log's files, as a trait: a test can stop, fail or forget at any of them.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What a log's files are changed through.
///
/// Reading needs no double: what a double lets through is in the file system. Each method is one step
/// that a crash can come before or after; [`sync`](Self::sync) and [`sync_dir`](Self::sync_dir) are what
/// makes earlier steps outlive a loss of power.
pub trait Storage: fmt::Debug + Send + Sync {
    /// Opens a file for reading and writing.
    ///
    /// # Errors
    ///
    /// As `open(2)`; so are those of the other methods the system's.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<File>;

    /// Writes all of `bytes`. After an error any part of them may be in the file.
    ///
    /// # Errors
    ///
    /// As `pwrite(2)`.
    fn write_at(&self, file: &File, bytes: &[u8], position: u64) -> io::Result<()>;

    /// Cuts a file off.
    ///
    /// # Errors
    ///
    /// As `ftruncate(2)`.
    fn set_len(&self, file: &File, len: u64) -> io::Result<()>;

    /// Waits until a file's bytes and length are on the device.
    ///
    /// # Errors
    ///
    /// As `fdatasync(2)`. The kernel may have dropped what it could not write.
    fn sync(&self, file: &File) -> io::Result<()>;

    /// Gives a file another name, over whatever had it.
    ///
    /// # Errors
    ///
    /// As `rename(2)`.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    ///
    /// As `unlink(2)`.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Waits until names made, changed or removed in a directory are on the device.
    ///
    /// # Errors
    ///
    /// As `fsync(2)`.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// What [`Storage::open`] expects to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// The file must exist.
    Existing,
    /// The file must not exist; it is made.
    New,
    /// Afterwards the file is empty, whatever was there.
    Empty,
}

/// The file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct Disk;

impl Storage for Disk {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        match mode {
            OpenMode::Existing => &mut options,
            OpenMode::New => options.create_new(true),
            OpenMode::Empty => options.create(true).truncate(true),
        };
        options.open(path)
    }

    fn write_at(&self, file: &File, bytes: &[u8], position: u64) -> io::Result<()> {
        file.write_all_at(bytes, position)
    }

    fn set_len(&self, file: &File, len: u64) -> io::Result<()> {
        file.set_len(len)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }
}
