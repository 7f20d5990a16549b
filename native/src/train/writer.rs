//! Checkpoints written while training goes on: one at a time, and none is forgotten.

use std::thread::{Builder, JoinHandle};

use anyhow::{Context, Result, anyhow};

/// What writes on a thread of its own. Dropping it waits.
#[derive(Debug, Default)]
pub(super) struct Writer {
    writing: Option<JoinHandle<Result<()>>>,
}

impl Writer {
    /// Begins to `write`, once what was begun before has ended.
    ///
    /// # Errors
    /// That of what was begun before, and `write` is then left; or if there is no thread.
    pub(super) fn begin(&mut self, write: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        self.wait()?;
        let thread = Builder::new().name("checkpoint".to_owned()).spawn(write);
        self.writing = Some(thread.context("no thread to write a checkpoint")?);
        Ok(())
    }

    /// Waits for nothing.
    ///
    /// # Errors
    /// That of what was begun, where it has ended; once.
    pub(super) fn look(&mut self) -> Result<()> {
        if self.writing.as_ref().is_some_and(JoinHandle::is_finished) { self.wait() } else { Ok(()) }
    }

    /// Waits until everything is written.
    ///
    /// # Errors
    /// That of what was begun; once.
    pub(super) fn wait(&mut self) -> Result<()> {
        match self.writing.take() {
            Some(writing) => writing.join().map_err(|_| anyhow!("writing a checkpoint failed"))?,
            None => Ok(()),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Its run has failed of something else, which is what is said.
        if let Err(error) = self.wait() {
            tracing::warn!("{error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::channel;

    use anyhow::bail;

    #[test]
    fn one_is_written_at_a_time_and_beside_everything_else() {
        let (mut writer, done) = (Writer::default(), Arc::new(AtomicU32::new(0)));
        let (go, wait) = channel::<()>();
        let counted = Arc::clone(&done);
        writer
            .begin(move || {
                wait.recv()?;
                counted.fetch_add(1, Ordering::SeqCst);
                Ok(())
            })
            .unwrap();
        // Still writing: nobody waits for it, until something else is to be written.
        writer.look().unwrap();
        assert_eq!(done.load(Ordering::SeqCst), 0);
        go.send(()).unwrap();
        let (counted, before) = (Arc::clone(&done), Arc::clone(&done));
        writer
            .begin(move || {
                counted.fetch_add(10, Ordering::SeqCst);
                Ok(())
            })
            .unwrap();
        assert!(before.load(Ordering::SeqCst) >= 1, "two at a time");
        drop(writer);
        assert_eq!(done.load(Ordering::SeqCst), 11);
    }

    #[test]
    fn an_error_is_said_once_by_whoever_comes_next() {
        let mut writer = Writer::default();
        let fail = || bail!("the disk is full");
        writer.begin(fail).unwrap();
        while !writer.writing.as_ref().unwrap().is_finished() {
            std::thread::yield_now();
        }
        assert_eq!(writer.look().unwrap_err().to_string(), "the disk is full");
        assert!(writer.look().is_ok() && writer.wait().is_ok());
        writer.begin(fail).unwrap();
        assert_eq!(writer.begin(|| bail!("never begun")).unwrap_err().to_string(), "the disk is full");
        assert!(writer.wait().is_ok());
        writer.begin(|| panic!("on purpose")).unwrap();
        assert!(writer.wait().is_err());
    }
}
