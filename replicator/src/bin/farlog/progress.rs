//! How far a long command is.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

/// A line on standard error that is rewritten; nothing where that is not a terminal.
pub(crate) fn line() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg}").expect("the template is well-formed");
    ProgressBar::new_spinner().with_style(style)
}
