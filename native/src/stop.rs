//! Stopping on request: Ctrl-C and SIGTERM raise a flag that long loops look at between units of work.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// The error a command ends with when it was asked to stop and left a resumable state.
#[derive(Debug, thiserror::Error)]
#[error("stopped on request; run the same command again to resume")]
pub struct Stopped;

/// The process-wide flag, once signals are listened to.
static FLAG: OnceLock<StopFlag> = OnceLock::new();

/// Whether the process was asked to stop; for work too deep down to be handed a flag.
#[must_use]
pub fn is_raised() -> bool {
    FLAG.get().is_some_and(StopFlag::is_raised)
}

/// A flag that says whether the process was asked to stop; clones share it.
#[derive(Debug, Clone, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// The process-wide flag, raised by Ctrl-C and SIGTERM; a second signal ends the process at once.
    ///
    /// # Errors
    /// If the handler cannot be installed.
    pub fn from_signals() -> anyhow::Result<Self> {
        if let Some(flag) = FLAG.get() {
            return Ok(flag.clone());
        }
        let flag = Self::default();
        let raised = flag.clone();
        ctrlc::set_handler(move || {
            if raised.0.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        })?;
        Ok(FLAG.get_or_init(|| flag).clone())
    }

    /// Asks for a stop.
    pub fn raise(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// An error when a stop was asked for.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn check(&self) -> Result<(), Stopped> {
        if self.is_raised() { Err(Stopped) } else { Ok(()) }
    }

    /// Whether a stop was asked for.
    #[must_use]
    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
