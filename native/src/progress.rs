//! Progress bars of one look: what is done, how fast, how long still.
//!
//! On a terminal the bar is redrawn in place; elsewhere (a log file, continuous integration) it is a line now and then.

use std::fmt::Debug;
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

/// How often a log gets a line.
const LINE_EVERY: Duration = Duration::from_secs(20);
/// The columns of a line in a log.
const LINE_WIDTH: u16 = 160;

/// A bar over `total` units of `unit` (for example `tokens`), with rate, ETA and a free message, on standard error.
#[must_use]
pub fn bar(total: u64, stage: &'static str, unit: &str) -> ProgressBar {
    let target = if io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::term_like_with_hz(Box::new(Lines::new(io::stderr(), LINE_EVERY)), 1)
    };
    let template = format!(
        "{{prefix:>9}} [{{bar:30}}] {{human_pos}}/{{human_len}} {unit} · {{per_sec}} · ETA {{eta}} {{wide_msg}}"
    );
    let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(Some(total), target);
    let bar = bar.with_style(style.progress_chars("━╸ ")).with_prefix(stage);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// A terminal that is none: of all that is drawn it writes one whole line every so often.
#[derive(Debug)]
struct Lines<W> {
    state: Mutex<LinesState<W>>,
    every: Duration,
}

#[derive(Debug)]
struct LinesState<W> {
    out: W,
    drawn: String,
    last: Instant,
}

impl<W> Lines<W> {
    /// The first line comes after `every`: short work stays silent.
    fn new(out: W, every: Duration) -> Self {
        Self { state: Mutex::new(LinesState { out, drawn: String::new(), last: Instant::now() }), every }
    }

    fn with<T>(&self, f: impl FnOnce(&mut LinesState<W>) -> T) -> T {
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<W: Write + Debug + Send> TermLike for Lines<W> {
    fn width(&self) -> u16 {
        LINE_WIDTH
    }

    fn move_cursor_up(&self, _n: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_down(&self, _n: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_right(&self, _n: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_left(&self, _n: usize) -> io::Result<()> {
        Ok(())
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.write_str(text)
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.with(|state| state.drawn.push_str(text));
        Ok(())
    }

    fn clear_line(&self) -> io::Result<()> {
        self.with(|state| state.drawn.clear());
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.with(|state| {
            let line = std::mem::take(&mut state.drawn);
            if line.trim().is_empty() || state.last.elapsed() < self.every {
                return Ok(());
            }
            state.last = Instant::now();
            writeln!(state.out, "{}", line.trim_end())?;
            state.out.flush()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_gets_whole_lines_and_not_too_many() {
        let often = Lines::new(Vec::new(), Duration::ZERO);
        let seldom = Lines::new(Vec::new(), Duration::from_secs(3600));
        for lines in [&often, &seldom] {
            for step in ["one", "two"] {
                lines.clear_line().unwrap();
                lines.write_str(step).unwrap();
                lines.write_str(" done   ").unwrap();
                lines.flush().unwrap();
            }
            lines.flush().unwrap();
        }
        assert_eq!(often.with(|s| String::from_utf8(s.out.clone()).unwrap()), "one done\ntwo done\n");
        assert!(seldom.with(|s| s.out.is_empty()));
    }
}
