//! Readers written by others meet hostile files here: where one of them panics instead of returning an error, it becomes one.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

use anyhow::{Result, bail};

thread_local! {
    /// Whether a panic of this thread is awaited, and need not be announced.
    static AWAITED: Cell<bool> = const { Cell::new(false) };
}

/// Does `work` of a foreign reader; a panic in it is an error. What it worked on must not be used after one.
pub(super) fn foreign<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !AWAITED.get() {
                before(info);
            }
        }));
    });
    AWAITED.set(true);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    AWAITED.set(false);
    match result {
        Ok(result) => result,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            bail!("its contents contradict themselves ({text})")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_errors_and_the_rest_passes() {
        assert_eq!(foreign(|| Ok(3)).unwrap(), 3);
        assert_eq!(foreign(|| -> Result<()> { bail!("no") }).unwrap_err().to_string(), "no");
        let error = foreign(|| -> Result<()> { panic!("index {}", 7) }).unwrap_err().to_string();
        assert!(error.contains("index 7"), "{error}");
    }
}
