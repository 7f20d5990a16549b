//! Packages of the operating system: installed when that is ours to do, else named in a sentence.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::places::on_path;
use crate::run::Program;

/// Installs Debian packages when root on a Debian-like system; otherwise fails with the command to give.
///
/// `what` names the thing wanted, `elsewhere` says what to do on other systems.
pub(crate) fn ensure_packages(packages: &[&str], what: &str, elsewhere: &str) -> Result<()> {
    let list = packages.join(" ");
    if on_path("apt-get").is_none() {
        bail!("{what} is missing, so {elsewhere} and run the same command again");
    }
    if !is_root() {
        bail!(
            "{what} is missing, so run `sudo apt-get install --no-install-recommends {list}` and then the same command again"
        );
    }
    let failed = || {
        format!("apt-get could not install {list}, so install {what} by hand and run the same command again")
    };
    let apt = || Program::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive");
    // A fresh image has no package lists; where there are some, an update that fails (no network) need not be the end.
    let updated = apt().args(["update", "--quiet"]).run();
    if !has_lists() {
        updated.with_context(failed)?;
    }
    apt()
        .args(["install", "--yes", "--quiet", "--no-install-recommends"])
        .args(packages)
        .run()
        .with_context(failed)
}

/// Whether package lists were ever fetched.
fn has_lists() -> bool {
    fs::read_dir("/var/lib/apt/lists")
        .is_ok_and(|mut d| d.any(|e| e.is_ok_and(|e| e.path().is_file() && e.file_name() != "lock")))
}

fn is_root() -> bool {
    // `id -u` says it on every Unix without a line of unsafe code.
    Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout.trim_ascii() == b"0")
}
