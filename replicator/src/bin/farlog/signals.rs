//! SIGINT and SIGTERM as messages.

use std::io;
use std::thread;

use crossbeam::channel::Sender;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// From now on sends the name of each SIGINT or SIGTERM that arrives, instead of dying of it. A full
/// channel drops it: whoever has one unread is stopping already.
pub(crate) fn forward(sender: Sender<&'static str>) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let run = move || {
        for signal in signals.forever() {
            let name = if signal == SIGINT {
                "SIGINT"
            } else {
                "SIGTERM"
            };
            let _ = sender.try_send(name);
        }
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(run)
        .map(drop)
}
