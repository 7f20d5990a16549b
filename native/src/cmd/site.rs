//! `stratascope site`.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::site;

/// Arguments of `site`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Puts the built page and packs together as static files: any web server can publish them, on any path. Every file \
of a pack is compared with the hash in its manifest on the way.

Examples:
  stratascope site --pack packs/a --pack packs/b --out site
  stratascope site --out site --serve 127.0.0.1:8080        serve a site that is already there")]
pub(crate) struct Args {
    /// The built page (a folder with index.html), made by `trunk build --release`.
    #[arg(long, value_name = "DIR", default_value = "dist")]
    web: PathBuf,
    /// A pack made by `features`; repeat for several. Without any, --out must be a site already.
    #[arg(long = "pack", value_name = "DIR")]
    packs: Vec<PathBuf>,
    /// Folder of the site; an older site there is replaced.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Serve the site on this address afterwards, until interrupted; a busy port is followed by the next.
    #[arg(long, value_name = "ADDR", num_args = 0..=1, default_missing_value = "127.0.0.1:8080", value_parser = site::parse_address)]
    serve: Option<SocketAddr>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if args.packs.is_empty() {
        ensure!(args.serve.is_some(), "nothing to do: give a --pack to put into the site, or --serve it");
    } else {
        let summary = site::build(&args.web, &args.packs, &args.out)?;
        #[expect(clippy::cast_precision_loss, reason = "shown in megabytes")]
        let megabytes = summary.bytes as f64 / 1e6;
        let place = args.out.display();
        writeln!(out, "{} files, {megabytes:.1} MB in {place}", summary.files)?;
        for pack in &summary.packs {
            writeln!(out, "  {}: {}", pack.name, pack.title)?;
        }
    }
    let Some(address) = args.serve else {
        return Ok(());
    };
    site::serve(&args.out, address, |address| {
        // A closed standard output must not stop the server.
        let _ = writeln!(out, "http://{address}/  (Ctrl-C stops)").and_then(|()| out.flush());
    })
}
