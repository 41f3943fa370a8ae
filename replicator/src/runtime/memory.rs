//! The memory of a node: images and the table, in named files, registered at addresses never used twice.
//!
//! ```text
//! SHM_DIR/
//!   memory_id                  16 random bytes, also in DATA_DIR: another one means memory was lost
//!   lock                       held while a process uses the directory
//!   table                      the table, 256 bytes per partition of the cluster
//!   P-ID-S-N.image             one per image: partition index and image id, in hexadecimal, whether it
//!                              begins a segment (1 or 0), and a number that no other one has
//! ```
//!
//! A file is made for each image and removed with it, so an image begins as zeros and its bytes are
//! written once. Files outlive the process: a restart drains what they hold. [`Books`] count all of it, and
//! hold it to the node's limit.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FlockOperation, flock};
use transport::{AccessFlags, Mapping, ProtectionDomain, SharedRegion};

use super::error::NodeError;
use crate::image::ImageId;
use crate::table::{ENTRY_LEN, Entry, Line, entry_byte_offset, tail_byte_offset};

/// Images are registered from here on; below lie the addresses that a process has naturally.
const FIRST_ADDR: u64 = 1 << 52;
/// Addresses of registrations and of their memory must agree below this.
const PAGE_LEN: usize = 4096;
/// Between two registrations, so that no request can run from one into the next.
const GUARD_LEN: u64 = 1 << 20;

/// Numbers the images that this process has made. Only uniqueness matters.
static IMAGES_MADE: AtomicU64 = AtomicU64::new(0);

/// Hands out addresses for registrations, each once.
#[derive(Debug)]
pub(super) struct AddressSpace(AtomicU64);

impl AddressSpace {
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(FIRST_ADDR))
    }

    /// An address for memory that begins at this place of a mapping: the two agree within a page.
    fn take_for(&self, byte_offset: usize, len: usize) -> u64 {
        self.take(len + PAGE_LEN) + (byte_offset % PAGE_LEN) as u64
    }

    fn take(&self, len: usize) -> u64 {
        let len = (len as u64).next_multiple_of(GUARD_LEN) + GUARD_LEN;
        // Only uniqueness matters; no other memory is published by it.
        self.0.fetch_add(len, Ordering::Relaxed)
    }
}

/// A lock on a directory, until it is dropped or the process ends.
#[derive(Debug)]
pub(super) struct DirectoryLock(#[expect(dead_code, reason = "held open")] File);

/// Creates a directory if need be, and locks it.
pub(super) fn lock_directory(dir: &Path) -> Result<DirectoryLock, NodeError> {
    let failed = |source| NodeError::directory(dir, source);
    let mut builder = fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(failed)?;
    let path = dir.join("lock");
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(false).mode(0o600);
    let file = options
        .open(&path)
        .map_err(|source| NodeError::directory(&path, source))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(DirectoryLock(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(NodeError::InUse {
            path: dir.to_owned(),
        }),
        Err(errno) => Err(NodeError::directory(path, errno.into())),
    }
}

/// What a start finds of the log memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MemoryState {
    /// It is that of the last run, and so is the page cache: only the process can have crashed.
    Kept,
    /// The data directory is older than the memory: what was not in the files is gone.
    Lost,
    /// There was none.
    New,
}

/// Compares the memory ids of log memory and data directory, and makes them equal.
///
/// Returns the id, and what became of the memory that belongs to the data.
pub(super) fn check_memory_id(
    shm_dir: &Path,
    data_dir: &Path,
) -> Result<([u8; 16], MemoryState), NodeError> {
    let in_memory = read_id(&shm_dir.join("memory_id"))?;
    let in_data = read_id(&data_dir.join("memory_id"))?;
    if let Some(id) = in_memory.filter(|_| in_memory == in_data) {
        return Ok((id, MemoryState::Kept));
    }
    let mut id = [0; 16];
    getrandom::fill(&mut id)
        .map_err(|error| NodeError::directory(shm_dir, io::Error::other(error)))?;
    // The data directory is last: until it agrees, the next start finds the memory foreign again.
    remove_images(shm_dir)?;
    write_id(&shm_dir.join("memory_id"), id)?;
    write_id(&data_dir.join("memory_id"), id)?;
    let state = match in_data {
        Some(_) => MemoryState::Lost,
        None => MemoryState::New,
    };
    Ok((id, state))
}

fn read_id(path: &Path) -> Result<Option<[u8; 16]>, NodeError> {
    let mut id = [0; 16];
    match File::open(path).and_then(|mut file| file.read_exact(&mut id)) {
        Ok(()) => Ok(Some(id)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof
            ) =>
        {
            Ok(None)
        }
        Err(source) => Err(NodeError::directory(path, source)),
    }
}

fn write_id(path: &Path, id: [u8; 16]) -> Result<(), NodeError> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(&id)?;
        file.sync_all()
    };
    write().map_err(|source| NodeError::directory(path, source))
}

fn remove_images(shm_dir: &Path) -> Result<(), NodeError> {
    for path in image_files(shm_dir)?.into_iter().map(|file| file.path) {
        fs::remove_file(&path).map_err(|source| NodeError::directory(path, source))?;
    }
    match fs::remove_file(shm_dir.join("table")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(NodeError::directory(shm_dir.join("table"), error))
        }
        _ => Ok(()),
    }
}

/// An image that a run has left.
#[derive(Debug)]
pub(super) struct ImageFile {
    /// The partition's index.
    pub(super) partition: usize,
    pub(super) id: ImageId,
    /// Whether its first byte is the first one of a segment.
    pub(super) starts_segment: bool,
    pub(super) path: PathBuf,
}

/// The images in a directory.
pub(super) fn image_files(shm_dir: &Path) -> Result<Vec<ImageFile>, NodeError> {
    let failed = |source| NodeError::directory(shm_dir, source);
    let mut images = Vec::new();
    for entry in fs::read_dir(shm_dir).map_err(failed)? {
        images.extend(parse_image_path(entry.map_err(failed)?.path()));
    }
    Ok(images)
}

fn parse_image_path(path: PathBuf) -> Option<ImageFile> {
    let name = path.file_name()?.to_str()?.strip_suffix(".image")?;
    let mut parts = name.split('-');
    let partition = usize::from_str_radix(parts.next()?, 16).ok()?;
    let id = ImageId(u64::from_str_radix(parts.next()?, 16).ok()?);
    let starts_segment = parts.next()? == "1";
    Some(ImageFile {
        partition,
        id,
        starts_segment,
        path,
    })
}

/// Which image to make.
#[derive(Debug, Clone, Copy)]
pub(super) struct ImageSpec {
    /// The partition's index.
    pub(super) partition: usize,
    pub(super) id: ImageId,
    /// Bytes.
    pub(super) len: u32,
    /// Whether its first byte is the first one of a segment.
    pub(super) starts_segment: bool,
    pub(super) purpose: Purpose,
}

impl ImageSpec {
    fn path(&self, shm_dir: &Path) -> PathBuf {
        let (partition, id) = (self.partition, self.id.0);
        let starts_segment = u8::from(self.starts_segment);
        // After a fence an image is made anew while consumers may still have the one before it.
        let number = IMAGES_MADE.fetch_add(1, Ordering::Relaxed);
        shm_dir.join(format!(
            "{partition:x}-{id:016x}-{starts_segment}-{number:x}.image"
        ))
    }
}

/// The domains that memory is registered in. Peers of one cannot use keys of the other.
#[derive(Debug, Clone)]
pub(super) struct Domains {
    /// Leaders write here.
    pub(super) replication: ProtectionDomain,
    /// Consumers read here.
    pub(super) consumer: ProtectionDomain,
    pub(super) addresses: Arc<AddressSpace>,
    pub(super) books: Arc<Books>,
}

/// How much memory images take.
#[derive(Debug)]
pub(super) struct Books {
    /// Most bytes that images may take.
    limit: u64,
    images_len: AtomicU64,
    images_count: AtomicU64,
    registered_len: AtomicU64,
}

impl Books {
    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
            images_len: AtomicU64::new(0),
            images_count: AtomicU64::new(0),
            registered_len: AtomicU64::new(0),
        }
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Whether an image of `len` bytes may be made. Only the helper makes images.
    pub(super) fn has_room(&self, len: u32) -> bool {
        self.images_len() + u64::from(len) <= self.limit
    }

    // Counts publish no other memory, so no order is needed.

    fn registered(&self, regions: usize, len: usize) {
        let bytes = (regions * len) as u64;
        self.registered_len.fetch_add(bytes, Ordering::Relaxed);
    }

    fn deregistered(&self, regions: usize, len: usize) {
        let bytes = (regions * len) as u64;
        self.registered_len.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Bytes of all images.
    pub(super) fn images_len(&self) -> u64 {
        self.images_len.load(Ordering::Relaxed)
    }

    /// How many images there are.
    pub(super) fn images_count(&self) -> u64 {
        self.images_count.load(Ordering::Relaxed)
    }

    /// Bytes of images that are registered; those registered twice count twice.
    pub(super) fn registered_len(&self) -> u64 {
        self.registered_len.load(Ordering::Relaxed)
    }
}

impl Domains {
    fn register(
        &self,
        pd: &ProtectionDomain,
        mapping: &Arc<Mapping>,
        access: AccessFlags,
    ) -> transport::Result<Arc<SharedRegion>> {
        let addr = self.addresses.take(mapping.len());
        pd.register(mapping, 0..mapping.len(), access, Some(addr))
            .map(Arc::new)
    }

    fn register_readable(&self, mapping: &Arc<Mapping>) -> transport::Result<Arc<SharedRegion>> {
        self.register(&self.consumer, mapping, AccessFlags::REMOTE_READ)
    }
}

/// What an image is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A leader's: sent from, and read by consumers.
    Leader,
    /// A follower's: written by the leader, and read by consumers.
    Follower,
    /// A copy of file bytes that a leader sends from.
    ColdSource,
    /// A copy of file bytes that consumers read.
    ColdRead,
}

/// An image's memory and registrations.
///
/// Dropping it deregisters, and then removes the file if the image has been retired: without that its
/// bytes may be wanted by the next start.
#[derive(Debug)]
pub(super) struct Image {
    /// Registered to be sent from: a leader's.
    source: Option<Arc<SharedRegion>>,
    /// What others may do to it, until it is withdrawn.
    granted: Mutex<Granted>,
    mapping: Arc<Mapping>,
    path: Option<PathBuf>,
    starts_segment: bool,
    is_retired: AtomicBool,
    books: Arc<Books>,
}

/// The registrations of an image that others use.
#[derive(Debug, Default)]
struct Granted {
    /// A follower's leader may write.
    writable: Option<Arc<SharedRegion>>,
    /// Consumers may read.
    readable: Option<Arc<SharedRegion>>,
}

impl Image {
    /// Makes an image that begins with the bytes `fill`.
    ///
    /// All pages exist afterwards, and are zero behind `fill`.
    pub(super) fn make(
        domains: &Domains,
        shm_dir: &Path,
        spec: &ImageSpec,
        fill: &[u8],
    ) -> transport::Result<Self> {
        let (len, purpose) = (spec.len as usize, spec.purpose);
        let is_named = matches!(purpose, Purpose::Leader | Purpose::Follower);
        let path = is_named.then(|| spec.path(shm_dir));
        let mapping = match &path {
            Some(path) => Mapping::create_shm(path, len)?,
            None => Mapping::anonymous(len)?,
        };
        // A failure on the way to a complete image removes the file.
        let is_retired = AtomicBool::new(true);
        let books = Arc::clone(&domains.books);
        books.images_count.fetch_add(1, Ordering::Relaxed);
        books
            .images_len
            .fetch_add(spec.len.into(), Ordering::Relaxed);
        let mut image = Self {
            source: None,
            granted: Mutex::default(),
            mapping,
            path,
            starts_segment: spec.starts_segment,
            is_retired,
            books,
        };
        image.mapping.write_at(0, fill)?;
        // Touches every page, so that the threads that copy and send meet no page fault.
        image.mapping.zero(fill.len()..len)?;
        let mut granted = Granted::default();
        let register = |access| domains.register(&domains.replication, &image.mapping, access);
        match purpose {
            Purpose::Leader | Purpose::ColdSource => {
                image.source = Some(register(AccessFlags::empty())?);
            }
            Purpose::Follower => {
                let access = AccessFlags::LOCAL_WRITE | AccessFlags::REMOTE_WRITE;
                granted.writable = Some(register(access)?);
            }
            Purpose::ColdRead => {}
        }
        if purpose != Purpose::ColdSource {
            granted.readable = Some(domains.register_readable(&image.mapping)?);
        }
        let regions = granted.writable.iter().chain(&granted.readable);
        let regions = regions.chain(&image.source).count();
        image.books.registered(regions, len);
        image.granted = Mutex::new(granted);
        image.is_retired = AtomicBool::new(false);
        Ok(image)
    }

    /// Nobody needs the bytes any more: the last owner removes the file.
    pub(super) fn retire(&self) {
        // The last owner's drop comes after this by the count of the `Arc`.
        self.is_retired.store(true, Ordering::Relaxed);
    }

    /// Whether its first byte is the first one of a segment.
    pub(super) fn starts_segment(&self) -> bool {
        self.starts_segment
    }

    pub(super) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// The registration that a leader sends from.
    pub(super) fn source(&self) -> Option<&Arc<SharedRegion>> {
        self.source.as_ref()
    }

    /// The registration that a leader writes to. Whoever takes it lets go of it at once: it stands in the
    /// way of a withdrawal.
    pub(super) fn writable(&self) -> Option<Arc<SharedRegion>> {
        self.granted().writable.clone()
    }

    /// The registration that consumers read; as [`Image::writable`].
    pub(super) fn readable(&self) -> Option<Arc<SharedRegion>> {
        self.granted().readable.clone()
    }

    fn granted(&self) -> MutexGuard<'_, Granted> {
        lock(&self.granted)
    }

    /// Ends what was granted for replication, whoever holds the image: once this has returned `Ok`, no
    /// leader changes the bytes. May be called again.
    pub(super) fn revoke(&self) -> transport::Result<()> {
        self.deregister(&mut self.granted().writable)
    }

    /// As [`Image::revoke`], and no consumer reads the bytes, either.
    pub(super) fn withdraw(&self) -> transport::Result<()> {
        let Granted { writable, readable } = &mut *self.granted();
        self.deregister(writable)?;
        self.deregister(readable)
    }

    fn deregister(&self, granted: &mut Option<Arc<SharedRegion>>) -> transport::Result<()> {
        if deregister(granted)? {
            self.books.deregistered(1, self.mapping.len());
        }
        Ok(())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let Granted { writable, readable } = std::mem::take(&mut *self.granted());
        let regions = [self.source.take(), writable, readable];
        let (books, len) = (&self.books, self.mapping.len());
        let count = regions.iter().flatten().count();
        drop(regions);
        books.deregistered(count, len);
        books.images_len.fetch_sub(len as u64, Ordering::Relaxed);
        books.images_count.fetch_sub(1, Ordering::Relaxed);
        if let Some(path) = self.path.as_ref().filter(|_| *self.is_retired.get_mut())
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "an image's file cannot be removed");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends a registration, which stays if that fails; says whether there was one.
fn deregister(region: &mut Option<Arc<SharedRegion>>) -> transport::Result<bool> {
    let Some(registered) = region.take() else {
        return Ok(false);
    };
    registered.deregister_shared().map_err(|failed| {
        *region = Some(failed.value);
        *failed.error
    })?;
    Ok(true)
}

/// The registered table.
#[derive(Debug)]
pub(super) struct Table {
    mapping: Arc<Mapping>,
    /// Each entry for itself, while a leader may write its tails: withdrawn like the images are.
    writable: Vec<Mutex<Option<Arc<SharedRegion>>>>,
    readable: Arc<SharedRegion>,
}

/// Whether a process was killed after it had made the file and before the file got its size: nobody has
/// used it.
pub(super) fn is_empty(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.len() == 0)
}

/// Maps the table's file, which is made if there is none or if the cluster has another size now.
pub(super) fn map_table(
    shm_dir: &Path,
    partitions_count: usize,
) -> Result<Arc<Mapping>, NodeError> {
    let path = shm_dir.join("table");
    let len = (partitions_count.max(1) * ENTRY_LEN).next_multiple_of(4096);
    if path.exists() {
        if !is_empty(&path) {
            let mapping = Mapping::open_shm(&path)?;
            if mapping.len() == len {
                return Ok(mapping);
            }
        }
        fs::remove_file(&path).map_err(|source| NodeError::directory(&path, source))?;
    }
    Ok(Mapping::create_shm(&path, len)?)
}

/// The entry of a partition as it is now.
pub(super) fn read_entry(table: &Mapping, partition: usize) -> Entry {
    let mut bytes = [0; ENTRY_LEN];
    table
        .read_at(entry_byte_offset(partition), &mut bytes)
        .expect("the table has an entry for every partition");
    Entry::decode(&bytes)
}

impl Table {
    pub(super) fn register(domains: &Domains, mapping: Arc<Mapping>) -> Result<Self, NodeError> {
        Ok(Self {
            writable: (0..mapping.len() / ENTRY_LEN)
                .map(|_| Mutex::new(None))
                .collect(),
            readable: domains.register_readable(&mapping)?,
            mapping,
        })
    }

    pub(super) fn entry(&self, partition: usize) -> Entry {
        read_entry(&self.mapping, partition)
    }

    /// Lets a leader write the entry's tails.
    pub(super) fn grant_entry(&self, domains: &Domains, partition: usize) -> transport::Result<()> {
        let mut writable = lock(&self.writable[partition]);
        if writable.is_none() {
            let at = entry_byte_offset(partition);
            let access = AccessFlags::LOCAL_WRITE | AccessFlags::REMOTE_WRITE;
            let range = at..at + ENTRY_LEN;
            let addr = domains.addresses.take_for(at, ENTRY_LEN);
            let region = domains
                .replication
                .register(&self.mapping, range, access, Some(addr))?;
            *writable = Some(Arc::new(region));
        }
        Ok(())
    }

    /// Where a leader writes the entry's tails, if one may: address and key.
    pub(super) fn writable_entry(&self, partition: usize) -> Option<(u64, u32)> {
        let writable = lock(&self.writable[partition]);
        let region = writable.as_ref()?;
        Some((region.addr(), region.rkey().0))
    }

    /// Once this has returned `Ok`, no leader writes to the entry.
    pub(super) fn revoke_entry(&self, partition: usize) -> transport::Result<()> {
        deregister(&mut lock(&self.writable[partition])).map(drop)
    }

    /// Where consumers read the entry: address and key.
    pub(super) fn readable_entry(&self, partition: usize) -> (u64, u32) {
        let addr = self.readable.addr() + entry_byte_offset(partition) as u64;
        (addr, self.readable.rkey().0)
    }

    /// The memory below.
    pub(super) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    pub(super) fn write_descriptor(&self, partition: usize, line: &Line) {
        self.write_line(entry_byte_offset(partition), line);
    }

    /// Writes a tail into the slot for `sequence`.
    pub(super) fn write_tail(&self, partition: usize, sequence: u32, line: &Line) {
        self.write_line(
            entry_byte_offset(partition) + tail_byte_offset(sequence),
            line,
        );
    }

    fn write_line(&self, byte_offset: usize, line: &Line) {
        self.mapping
            .write_at(byte_offset, line)
            .expect("the table has an entry for every partition");
    }
}
