//! Progress bars of one look: what is done, how fast, how long still.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over `total` units of `unit` (for example `tokens`), with rate, ETA and a free message.
/// Drawn on standard error, and only when that is a terminal.
#[must_use]
pub fn bar(total: u64, stage: &'static str, unit: &str) -> ProgressBar {
    let template = format!(
        "{{prefix:>9}} [{{bar:30}}] {{human_pos}}/{{human_len}} {unit} · {{per_sec}} · ETA {{eta}} {{wide_msg}}"
    );
    let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(total).with_style(style.progress_chars("━╸ ")).with_prefix(stage);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
