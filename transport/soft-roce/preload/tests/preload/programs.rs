//! Unmodified programs of the package ibverbs-utils.

use crate::support::{finish, preloaded, skip, succeed, text};

/// Whether a program is installed.
fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    if !found {
        skip(&format!(
            "{program} is not installed: apt-get install ibverbs-utils"
        ));
    }
    found
}

#[test]
fn devices_are_listed_by_address() {
    if !has("ibv_devices") {
        return;
    }
    let listed =
        succeed(preloaded("ibv_devices").env("FARLOG_DEVICE", "soft@127.0.7.1,soft@127.0.7.2"));
    assert!(listed.contains("soft@127.0.7.1 "), "{listed}");
    assert!(listed.contains("soft@127.0.7.2 "), "{listed}");
    let free = succeed(&mut preloaded("ibv_devices"));
    assert!(free.contains("soft@127."), "{free}");
}

#[test]
fn a_device_that_cannot_be_had_is_explained() {
    if !has("ibv_devices") {
        return;
    }
    for (name, hint) in [
        ("mlx5_0", "set it to soft@ADDRESS"),
        ("soft@203.0.113.1", "not an address of this machine"),
    ] {
        let output = finish(preloaded("ibv_devices").env("FARLOG_DEVICE", name));
        let printed = text(&output);
        assert!(
            !output.status.success() && printed.contains(hint),
            "{printed}"
        );
    }
}

/// With -v it also asks what only private functions tell.
#[test]
fn ibv_devinfo_prints_everything() {
    if !has("ibv_devinfo") {
        return;
    }
    let printed = succeed(
        preloaded("ibv_devinfo")
            .arg("-v")
            .env("FARLOG_DEVICE", "soft@127.0.7.3"),
    );
    for line in [
        "hca_id:\tsoft@127.0.7.3",
        "PORT_ACTIVE",
        "::ffff:127.0.7.3, RoCE v2",
    ] {
        assert!(printed.contains(line), "no {line:?} in {printed}");
    }
}

#[test]
fn ibv_rc_pingpong_finds_its_bytes_intact() {
    if !has("ibv_rc_pingpong") {
        return;
    }
    let mut server = preloaded("ibv_rc_pingpong");
    server
        .args(["-g", "0", "-c", "-n", "200", "-p", "18719"])
        .env("FARLOG_DEVICE", "soft@127.0.7.4");
    let server = std::thread::spawn(move || succeed(&mut server));
    // The client does not wait for a server that is not there yet.
    let mut client = String::new();
    for _ in 0..100 {
        std::thread::sleep(std::time::Duration::from_millis(100));
        let output = finish(
            preloaded("ibv_rc_pingpong")
                .args(["-g", "0", "-c", "-n", "200", "-p", "18719", "localhost"])
                .env("FARLOG_DEVICE", "soft@127.0.7.5"),
        );
        client = text(&output);
        if output.status.success() {
            break;
        }
        assert!(client.contains("Couldn't connect"), "{client}");
    }
    assert!(client.contains("200 iters in"), "{client}");
    let server = server.join().expect("the server ended well");
    assert!(server.contains("200 iters in"), "{server}");
}
