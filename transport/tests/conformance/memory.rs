//! Registrations of every kind of memory, devices and their description.

use transport::memory::Backing;
use transport::{
    AccessFlags, Error, LinkLayer, Mapping, PortState, Remote, SharedRegion, describe,
};

use crate::harness::{ALL, open, pair, pattern};

#[test]
fn addresses_are_chosen_freely() {
    let Some(mut pair) = pair() else { return };
    let image = pair.far.image.clone();
    for (seed, iova) in (1..).zip([0x1000, 0x7000_0000_0000, u64::MAX - (1 << 20) + 1 - 4096]) {
        let region = match pair.far.pd.register(&image, 4096..12_288, ALL, Some(iova)) {
            Ok(region) => region,
            Err(error) => panic!("at {iova:#x}: {error}"),
        };
        assert_eq!((region.addr(), region.len()), (iova, 8192));
        let bytes = pattern(seed, 8192);
        assert!(pair.near.write(&bytes, region.remote()).is_success());
        assert!(pair.far.image_bytes(4096, 8192) == bytes);
        let done = pair.near.read(100, region.remote().at(8092));
        assert!(done.buffer.unwrap().as_slice() == &bytes[8092..]);
        region.deregister().unwrap();
    }
    let error = pair
        .far
        .pd
        .register(&image, 0..4096, ALL, Some(u64::MAX))
        .unwrap_err();
    assert!(
        matches!(error, Error::Parameter { name: "iova", .. }),
        "{error}"
    );
}

/// Two registrations of the same bytes with different rights, as images have for peers and consumers.
#[test]
fn one_mapping_under_two_keys() {
    let Some(mut pair) = pair() else { return };
    let image = pair.far.image.clone();
    let read = AccessFlags::REMOTE_READ;
    let read_only = pair
        .far
        .pd
        .register(&image, 0..4096, read, Some(1 << 40))
        .unwrap();
    assert!(
        pair.near
            .write(b"for both", pair.far.remote(8))
            .is_success()
    );
    let done = pair.near.read(8, read_only.remote().at(8));
    assert_eq!(done.buffer.unwrap().as_slice(), b"for both");
    assert!(
        !pair
            .near
            .write(b"not here", read_only.remote())
            .is_success()
    );
    assert_eq!(pair.far.image_bytes(0, 8), [0; 8]);
}

#[test]
fn shared_memory_outlives_its_registration() {
    let Some(mut pair) = pair() else { return };
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("image");
    let image = Mapping::create_shm(&path, 10_000).unwrap();
    assert_eq!(image.backing(), &Backing::Shm(path.clone()));
    let region = pair.far.pd.register(&image, 0..10_000, ALL, None).unwrap();
    let bytes = pattern(4, 10_000);
    assert!(pair.near.write(&bytes, region.remote()).is_success());
    drop((region, image));
    let mut kept = vec![0; 10_000];
    Mapping::open_shm(&path)
        .unwrap()
        .read_at(0, &mut kept)
        .unwrap();
    assert!(kept == bytes);
}

#[test]
fn huge_pages() {
    let Some(mut pair) = pair() else { return };
    let image = match Mapping::hugetlb(2 << 20) {
        Ok(image) => image,
        Err(error) => {
            eprintln!("skipped: {error}");
            return;
        }
    };
    let region = pair.far.pd.register(&image, 0..2 << 20, ALL, None).unwrap();
    assert!(
        pair.near
            .write(b"huge", region.remote().at(1 << 20))
            .is_success()
    );
    let mut bytes = [0; 4];
    image.read_at(1 << 20, &mut bytes).unwrap();
    assert_eq!(&bytes, b"huge");
}

#[test]
fn a_registration_that_cannot_be_says_why() {
    let Some(pair) = pair() else { return };
    let image = &pair.far.image;
    let error = pair
        .far
        .pd
        .register(image, 0..4096, AccessFlags::REMOTE_WRITE, None)
        .unwrap_err();
    assert!(error.to_string().contains("need LOCAL_WRITE"), "{error}");
    let len = image.len();
    let error = pair
        .far
        .pd
        .register(image, 1..len + 1, ALL, None)
        .unwrap_err();
    assert!(matches!(error, Error::OutOfBounds { .. }), "{error}");
}

#[test]
fn keys_differ() {
    let Some(pair) = pair() else { return };
    let image = &pair.far.image;
    let regions: Vec<SharedRegion> = (0..50)
        .map(|_| pair.far.pd.register(image, 0..4096, ALL, None).unwrap())
        .collect();
    let mut keys: Vec<u32> = regions.iter().map(|region| region.rkey().0).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), 50);
}

#[test]
fn buffers_split_and_join() {
    let Some(pair) = pair() else { return };
    let mut buffer = pair.near.pd.alloc_local(100).unwrap();
    buffer.as_mut_slice().copy_from_slice(&pattern(1, 100));
    let whole = buffer.as_slice().to_vec();
    let front = buffer.split_to(30).unwrap();
    let (middle, back) = buffer.split_at(50).unwrap();
    assert_eq!((front.len(), middle.len(), back.len()), (30, 50, 20));
    let (front, back) = front.join(back).unwrap_err();
    let joined = front.join(middle).unwrap().join(back).unwrap();
    assert_eq!(joined.as_slice(), whole);
    let failed = joined.split_at(101).unwrap_err();
    assert!(matches!(*failed.error, Error::OutOfBounds { .. }));
    assert_eq!(failed.value.as_slice(), whole);
}

#[test]
fn a_device_describes_itself() {
    let Some(context) = open() else { return };
    let info = describe(&context);
    let details = info.details.unwrap();
    assert_eq!(info.name, context.name());
    assert!(details.attr.max_qp > 0 && details.attr.max_cqe > 0 && details.attr.max_sge > 1);
    assert_eq!(details.ports.len(), usize::from(details.attr.phys_port_cnt));
    let active = context.active_port().unwrap();
    assert_eq!(active.state, PortState::Active);
    let port = &details.ports[usize::from(active.port_num) - 1];
    let best = port.best_gid.as_ref().unwrap();
    assert!(port.gids.contains(best));
    if active.link_layer == LinkLayer::Ethernet {
        assert!(
            best.gid.is_ipv4_mapped() || !best.gid.is_link_local(),
            "{best:?}"
        );
    }
    let error = context.port(99).unwrap_err();
    assert!(matches!(error, Error::NoPort { port: 99, .. }), "{error}");
}

#[test]
fn a_key_of_zero_reaches_nothing() {
    let Some(mut pair) = pair() else { return };
    let nowhere = Remote {
        addr: pair.far.region.addr(),
        rkey: transport::Rkey(0),
    };
    assert!(!pair.near.write(b"x", nowhere).is_success());
}
