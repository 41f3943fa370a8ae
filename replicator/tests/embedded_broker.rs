//! The example of an embedding broker, so that it stays one that works.

#[allow(dead_code, reason = "a test has no use for its main")]
#[path = "../examples/embedded_broker/main.rs"]
mod embedded_broker;

#[test]
fn the_example_checks_what_it_has_appended() {
    let checked = embedded_broker::run().unwrap();
    assert!(checked.starts_with("2000 lines"), "{checked}");
}
