//! Starting other programs, and stopping them when this one is asked to stop.
//!
//! A child gets its own process group, so a signal reaches it once, from here, and with it all its own children:
//! a long stage of the native binary then writes its checkpoint and ends, and only after that does this process.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;
use std::{env, fmt};

use anyhow::{Context, Result, bail};

/// How often this process was asked to stop.
static STOPS: AtomicU32 = AtomicU32::new(0);

/// Makes Ctrl-C and SIGTERM a request that [`Program::run`] passes on.
pub(crate) fn watch_signals() -> Result<()> {
    ctrlc::set_handler(|| {
        STOPS.fetch_add(1, Ordering::Relaxed);
    })
    .context("cannot listen for Ctrl-C")
}

/// Whether a stop was asked for.
pub(crate) fn was_stopped() -> bool {
    STOPS.load(Ordering::Relaxed) > 0
}

/// A program to run: a thin builder over [`Command`] with this project's habits.
///
/// No standard input, no variables that cargo set for *this* process, and an error that is a sentence.
pub(crate) struct Program {
    command: Command,
    name: String,
}

impl Program {
    /// The program at a path, or of a name on `PATH`.
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let name = Path::new(program.as_ref())
            .file_stem()
            .unwrap_or(program.as_ref())
            .to_string_lossy()
            .into_owned();
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        for (key, _) in env::vars_os() {
            if is_set_by_cargo_run(&key) {
                command.env_remove(key);
            }
        }
        Self { command, name }
    }

    /// The cargo that runs this process.
    pub(crate) fn cargo() -> Self {
        Self::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
    }

    /// Without inherited flags and settings that belong to a build of this workspace, for building something else.
    ///
    /// Settings of the network and of registries stay: they belong to the machine.
    pub(crate) fn without_build_settings(mut self) -> Self {
        for (key, _) in env::vars_os() {
            if is_build_setting(&key) {
                self.command.env_remove(key);
            }
        }
        self
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    pub(crate) fn current_dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// With folders put before the others of `PATH`.
    pub(crate) fn with_path(self, folders: &[PathBuf]) -> Result<Self> {
        let old = env::var_os("PATH").unwrap_or_default();
        let paths = env::join_paths(folders.iter().cloned().chain(env::split_paths(&old)))
            .context("a tool folder holds a character that PATH cannot")?;
        Ok(self.env("PATH", paths))
    }

    /// Runs to the end with the terminal's output; any exit code but 0 is an error.
    pub(crate) fn run(mut self) -> Result<()> {
        own_group(&mut self.command);
        let child = self.command.spawn().with_context(|| format!("cannot start `{}`", self.name))?;
        let status = wait(child)?;
        if was_stopped() {
            bail!("`{}` was asked to stop", self.name);
        }
        if !status.success() {
            bail!("`{self}` ended with {status}");
        }
        Ok(())
    }

    /// Runs quietly and returns what it printed; an error carries the last line of its complaints.
    pub(crate) fn capture(mut self) -> Result<String> {
        let output = self.command.output().with_context(|| format!("cannot start `{}`", self.name))?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            let last = complaint.lines().map(str::trim).rfind(|l| !l.is_empty()).unwrap_or("it said nothing");
            bail!("`{}` ended with {}: {last}", self.name, output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)?;
        self.command.get_args().try_for_each(|arg| write!(f, " {}", arg.to_string_lossy()))
    }
}

fn own_group(command: &mut Command) {
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        command.process_group(0);
    }
    #[cfg(not(unix))]
    let _ = command;
}

/// Waits for the child; passes the first request to stop on as SIGTERM and a second one as SIGKILL.
fn wait(mut child: Child) -> Result<ExitStatus> {
    let mut passed_on = 0;
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a program")? {
            return Ok(status);
        }
        let asked = STOPS.load(Ordering::Relaxed).min(2);
        if asked > passed_on {
            passed_on = asked;
            pass_on(&mut child, asked);
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn pass_on(child: &mut Child, asked: u32) {
    if cfg!(unix) {
        let signal = if asked == 1 { "-TERM" } else { "-KILL" };
        // The whole group: cargo's compilers and npm's scripts are children of the child.
        // If `kill` cannot run, the child still ends by itself and is waited for.
        let _ = Command::new("kill").args([signal, "--", &format!("-{}", child.id())]).status();
    } else if asked == 2 {
        // The console has already told the child once.
        let _ = child.kill();
    }
}

/// Variables that `cargo run` sets for the program it starts: they would mislead a cargo started from here.
fn is_set_by_cargo_run(key: &OsString) -> bool {
    let key = key.to_string_lossy();
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"].iter().any(|p| key.starts_with(p))
        || ["CARGO_CRATE_NAME", "CARGO_PRIMARY_PACKAGE", "OUT_DIR"].contains(&key.as_ref())
}

fn is_build_setting(key: &OsString) -> bool {
    let key = key.to_string_lossy();
    ["CARGO_BUILD_", "CARGO_TARGET_", "CARGO_PROFILE_", "CARGO_INSTALL_"].iter().any(|p| key.starts_with(p))
        || [
            "RUSTFLAGS",
            "RUSTDOCFLAGS",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_INCREMENTAL",
            "RUSTC_WORKSPACE_WRAPPER",
        ]
        .contains(&key.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn build_settings_go_and_machine_settings_stay() {
        for gone in ["RUSTFLAGS", "CARGO_TARGET_DIR", "CARGO_BUILD_RUSTFLAGS", "CARGO_PROFILE_RELEASE_LTO"] {
            assert!(is_build_setting(&gone.into()), "{gone}");
        }
        for kept in
            ["CARGO_HOME", "CARGO_HTTP_CAINFO", "CARGO_NET_OFFLINE", "CARGO_REGISTRIES_X_INDEX", "PATH"]
        {
            assert!(!is_build_setting(&kept.into()) && !is_set_by_cargo_run(&kept.into()), "{kept}");
        }
        assert!(
            is_set_by_cargo_run(&"CARGO_MANIFEST_DIR".into())
                && is_set_by_cargo_run(&"CARGO_PKG_NAME".into())
        );
    }

    #[cfg(unix)]
    #[test]
    fn a_failure_says_what_ended_how() {
        let error =
            Program::new("sh").args(["-c", "echo first >&2; echo why >&2; exit 3"]).capture().unwrap_err();
        assert!(error.to_string().contains("exit status: 3: why"), "{error}");
        let error = Program::new("sh").args(["-c", "exit 4"]).run().unwrap_err();
        assert_eq!(error.to_string(), "`sh -c exit 4` ended with exit status: 4");
        assert!(
            Program::new("no-such-program-here").capture().unwrap_err().to_string().contains("cannot start")
        );
    }

    #[cfg(unix)]
    #[test]
    fn a_stop_reaches_the_children_of_the_child() {
        use std::io::Read;
        let mut program = Program::new("sh").args(["-c", "sleep 60 & echo started; wait"]);
        own_group(&mut program.command);
        let mut child = program.command.stdout(Stdio::piped()).spawn().unwrap();
        let mut output = child.stdout.take().unwrap();
        let mut started = [0; 8];
        output.read_exact(&mut started).unwrap();
        pass_on(&mut child, 1);
        assert!(!child.wait().unwrap().success());
        // The pipe closes only when the grandchild, which inherited it, has ended too.
        let before = std::time::Instant::now();
        output.read_to_string(&mut String::new()).unwrap();
        assert!(before.elapsed() < Duration::from_secs(30));
    }
}
