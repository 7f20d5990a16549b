//! A program that waits: it prints a line of JSON when it is ready, and one for each line it is given.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// A running program that takes its turn when asked to.
pub(crate) struct Worker {
    name: String,
    child: Child,
    /// `None` once it was told to end.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    /// What it said when it was ready.
    pub(crate) ready: Value,
}

impl Worker {
    /// Starts `command` and waits until it is ready.
    pub(crate) fn start(name: &str, command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("a program without an output")?;
        let output = BufReader::new(output);
        let mut worker = Self { name: name.to_owned(), child, input, output, ready: Value::Null };
        worker.ready = worker.read()?;
        Ok(worker)
    }

    /// Gives it a line and waits for the answer.
    pub(crate) fn ask(&mut self, line: &str) -> Result<Value> {
        let input = self.input.as_mut().context("a program that has been told to end")?;
        writeln!(input, "{line}").with_context(|| format!("{} takes no more lines", self.name))?;
        self.read()
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        let n =
            self.output.read_line(&mut line).with_context(|| format!("cannot read from {}", self.name))?;
        if n == 0 {
            bail!("{} ended early, so see its message above", self.name);
        }
        serde_json::from_str(&line)
            .with_context(|| format!("{} printed {:?}, which is not JSON", self.name, line.trim()))
    }

    /// Ends its input and waits for it.
    pub(crate) fn end(mut self) -> Result<()> {
        self.input = None;
        let status = self.child.wait().with_context(|| format!("cannot wait for {}", self.name))?;
        ensure!(status.success(), "{} ended with {status}", self.name);
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // After an error somewhere else: without input it ends by itself, and if it cannot be killed it has ended.
        self.input = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The number `key` of an answer.
pub(crate) fn number(answer: &Value, key: &str) -> Result<f64> {
    answer.get(key).and_then(Value::as_f64).with_context(|| format!("no number {key} in {answer}"))
}

#[cfg(test)]
mod tests {
    #[cfg(unix)]
    use super::*;

    #[cfg(unix)]
    fn shell(script: &str) -> Result<Worker> {
        Worker::start("sh", Command::new("sh").args(["-c", script]))
    }

    #[cfg(unix)]
    #[test]
    fn answers_come_line_by_line() {
        let mut worker =
            shell("echo '{\"tokens\": 7}'; while read x; do echo \"{\\\"$x\\\": 1.5}\"; done").unwrap();
        assert_eq!(number(&worker.ready, "tokens").unwrap(), 7.0);
        for word in ["round", "peak"] {
            assert_eq!(number(&worker.ask(word).unwrap(), word).unwrap(), 1.5);
        }
        assert!(number(&worker.ask("x").unwrap(), "seconds").unwrap_err().to_string().contains("seconds"));
        worker.end().unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn faults_name_the_program() {
        assert!(shell("exit 3").err().unwrap().to_string().contains("sh ended early"));
        assert!(shell("echo no").err().unwrap().to_string().contains("\"no\", which is not JSON"));
        assert!(
            shell("echo 1; read x; exit 2")
                .unwrap()
                .end()
                .unwrap_err()
                .to_string()
                .contains("exit status: 2")
        );
    }
}
