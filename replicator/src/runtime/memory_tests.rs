//! Images on the software device.

use std::fs;
use std::sync::Arc;

use transport::{Context, DeviceSelector, Error, ProtectionDomain};

use super::memory::{AddressSpace, Books, Domains, Image, ImageSpec, Purpose};
use crate::image::ImageId;

const LEN: u32 = 65536;

fn domains(limit: u64) -> Domains {
    let context = Context::open(&DeviceSelector::Soft(None)).unwrap();
    Domains {
        replication: ProtectionDomain::alloc(&context).unwrap(),
        consumer: ProtectionDomain::alloc(&context).unwrap(),
        addresses: Arc::new(AddressSpace::new()),
        books: Arc::new(Books::new(limit)),
    }
}

fn spec(count: u32, purpose: Purpose) -> ImageSpec {
    ImageSpec {
        partition: 0,
        id: ImageId::new(1, count),
        len: LEN,
        starts_segment: false,
        purpose,
    }
}

#[test]
fn a_withdrawn_image_has_no_registrations_whoever_holds_it() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let domains = domains(u64::MAX);
    let image = Image::make(&domains, dir.path(), &spec(1, Purpose::Follower), b"bytes").unwrap();
    let image = Arc::new(image);
    let reader = Arc::clone(&image);
    assert_eq!(domains.books.registered_len(), 2 * u64::from(LEN));
    let held = reader.readable();
    assert!(matches!(image.withdraw(), Err(Error::InUse { .. })));
    drop(held);
    image.withdraw().unwrap();
    assert!(image.writable().is_none() && reader.readable().is_none());
    assert_eq!(domains.books.registered_len(), 0);
    image.withdraw().unwrap();
    image.retire();
    drop((image, reader));
    assert_eq!(domains.books.images_len(), 0);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// Thousands of images under the same few names: each is zero behind what it begins with, and nothing is
/// left of it.
#[test]
fn images_come_and_go_without_a_trace() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let domains = domains(3 * u64::from(LEN));
    let purposes = [Purpose::Leader, Purpose::Follower, Purpose::ColdRead];
    for round in 0..2000 {
        let purpose = purposes[round % 3];
        assert!(domains.books.has_room(LEN));
        let image = Image::make(&domains, dir.path(), &spec(7, purpose), &[1; 100]).unwrap();
        let mut bytes = vec![0xa5; LEN as usize];
        image.mapping().read_at(0, &mut bytes).unwrap();
        assert!(bytes[..100] == [1; 100] && bytes[100..].iter().all(|&byte| byte == 0));
        image
            .mapping()
            .write_at(0, &vec![0xee; LEN as usize])
            .unwrap();
        image.retire();
    }
    let books = &domains.books;
    assert_eq!(
        (
            books.images_len(),
            books.images_count(),
            books.registered_len()
        ),
        (0, 0, 0)
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    let held: Vec<_> = (0..3)
        .map(|count| Image::make(&domains, dir.path(), &spec(count, Purpose::Leader), &[]).unwrap())
        .collect();
    assert!(!books.has_room(1));
    drop(held);
    assert!(books.has_room(LEN));
}
