//! Static sites: the built page and packs side by side, and a loopback server for them.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use axum::Router;
use axum::http::{HeaderValue, header};
use shared::pack::{self, Catalogue, Manifest, PackEntry};
use tokio::net::TcpListener;
use tower_http::services::ServeDir;
use tower_http::set_header::SetResponseHeaderLayer;

use crate::features::write::Staging;
use crate::files;

/// The file that makes a folder a built page.
const PAGE: &str = "index.html";
/// Largest manifest that is read.
const MOST_MANIFEST_BYTES: u64 = 64 << 20;
/// How many ports above the one asked for are tried.
const PORTS_TRIED: u16 = 20;

/// What a site was put together from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteSummary {
    /// The packs, in order.
    pub packs: Vec<PackEntry>,
    /// Bytes of all files.
    pub bytes: u64,
    /// Number of files.
    pub files: usize,
}

/// Puts the built page `web` and `packs` together at `out`, which appears whole or not at all.
/// Every file of a pack is compared with the hash in its manifest on the way.
///
/// # Errors
/// If the page or a pack is missing, incomplete or damaged, two packs share a name, or the disk refuses.
pub fn build(web: &Path, packs: &[PathBuf], out: &Path) -> Result<SiteSummary> {
    ensure!(
        web.join(PAGE).is_file(),
        "{} holds no built page (no {PAGE}); build it with `trunk build --release`, or name its folder with --web",
        web.display()
    );
    refuse_overlap(out, web, packs)?;
    let staging = Staging::create(out, pack::CATALOGUE)?;
    let mut summary = SiteSummary { packs: Vec::new(), bytes: 0, files: 0 };
    copy_page(web, Path::new(""), &staging, &mut summary)?;
    for folder in packs {
        let entry = copy_pack(folder, &staging, &mut summary)
            .with_context(|| format!("cannot use the pack {}", folder.display()))?;
        summary.packs.push(entry);
    }
    let catalogue = Catalogue::new(summary.packs.clone()).write().context("cannot list the packs")?;
    write(&staging, pack::CATALOGUE, &catalogue, &mut summary)?;
    staging.finish()?;
    Ok(summary)
}

/// `out` is replaced as a whole, so it must not be, contain or lie inside what it is made from.
fn refuse_overlap(out: &Path, web: &Path, packs: &[PathBuf]) -> Result<()> {
    let Ok(out) = out.canonicalize() else {
        return Ok(());
    };
    for source in packs.iter().map(PathBuf::as_path).chain([web]) {
        let overlaps = source.canonicalize().is_ok_and(|s| s.starts_with(&out) || out.starts_with(&s));
        ensure!(!overlaps, "--out {} overlaps {}; choose another folder", out.display(), source.display());
    }
    Ok(())
}

fn write(staging: &Staging, path: &str, bytes: &[u8], summary: &mut SiteSummary) -> Result<()> {
    staging.write(path, bytes)?;
    summary.bytes += bytes.len() as u64;
    summary.files += 1;
    Ok(())
}

/// Copies the page, but not packs that an earlier build may have left beside it.
fn copy_page(web: &Path, inside: &Path, staging: &Staging, summary: &mut SiteSummary) -> Result<()> {
    let folder = web.join(inside);
    let context = || format!("cannot read {}", folder.display());
    for entry in fs::read_dir(&folder).with_context(context)? {
        let entry = entry.with_context(context)?;
        let path = inside.join(entry.file_name());
        if path == Path::new("packs") || entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if entry.path().is_dir() {
            copy_page(web, &path, staging, summary)?;
            continue;
        }
        let bytes =
            fs::read(entry.path()).with_context(|| format!("cannot read {}", entry.path().display()))?;
        let name = path.to_str().with_context(|| format!("{} is not valid Unicode", path.display()))?;
        write(staging, name, &bytes, summary)?;
    }
    Ok(())
}

/// Reads the manifest of the pack in `folder`.
///
/// # Errors
/// If there is none, or it breaks the format.
pub fn read_manifest(folder: &Path) -> Result<Manifest> {
    let path = folder.join(pack::MANIFEST);
    let size = fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?.len();
    ensure!(size <= MOST_MANIFEST_BYTES, "{} has {size} bytes, more than a manifest can", path.display());
    let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Manifest::read(&bytes)?)
}

fn copy_pack(folder: &Path, staging: &Staging, summary: &mut SiteSummary) -> Result<PackEntry> {
    let manifest = read_manifest(folder)?;
    let entry = PackEntry::of(&manifest);
    if let Some(other) = summary.packs.iter().find(|p| p.name == entry.name) {
        bail!("its name {} is taken by the pack of {}", entry.name, other.title);
    }
    let root = format!("packs/{}", entry.path);
    for (path, wanted) in &manifest.files {
        let from = folder.join(path);
        let size = fs::metadata(&from).with_context(|| format!("cannot read {}", from.display()))?.len();
        ensure!(size == wanted.bytes, "{path} has {size} bytes, its manifest says {}", wanted.bytes);
        let bytes = fs::read(&from).with_context(|| format!("cannot read {}", from.display()))?;
        wanted.verify(path, &bytes)?;
        write(staging, &format!("{root}/{path}"), &bytes, summary)?;
    }
    write(staging, &format!("{root}/{}", pack::MANIFEST), &manifest.write()?, summary)?;
    Ok(entry)
}

/// Serves the folder `site` until the process ends; `ready` gets the address once it answers.
///
/// Everything may be cached but must be asked for again, so that a rebuilt site is seen at once.
///
/// # Errors
/// If neither the port asked for nor one of the next can be had.
pub fn serve(site: &Path, address: SocketAddr, ready: impl FnOnce(SocketAddr)) -> Result<()> {
    ensure!(site.join(PAGE).is_file(), "{} holds no site to serve (no {PAGE})", site.display());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the server")?;
    runtime.block_on(async {
        let listener = bind(address).await?;
        let revalidate =
            SetResponseHeaderLayer::overriding(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        let nosniff = SetResponseHeaderLayer::overriding(
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        );
        let router = Router::new().fallback_service(ServeDir::new(site)).layer(revalidate).layer(nosniff);
        ready(listener.local_addr().context("the server has no address")?);
        axum::serve(listener, router).await.context("the server stopped")
    })
}

/// The port asked for, or the next free one above it.
async fn bind(address: SocketAddr) -> Result<TcpListener> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for offset in 0..=PORTS_TRIED {
        let Some(port) = address.port().checked_add(offset) else {
            break;
        };
        match TcpListener::bind(SocketAddr::new(address.ip(), port)).await {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            Err(error) => return Err(error).with_context(|| format!("cannot listen on {address}")),
        }
    }
    Err(last).with_context(|| format!("no free port from {address} on"))
}

/// Parses `--serve`: an address with port, a port alone, or an address alone (port 8080).
///
/// # Errors
/// If it is none of them.
pub fn parse_address(text: &str) -> Result<SocketAddr> {
    let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    if let Ok(port) = text.trim_start_matches(':').parse() {
        return Ok(local(port));
    }
    if let Ok(address) = text.replacen("localhost", "127.0.0.1", 1).parse() {
        return Ok(address);
    }
    match text.replacen("localhost", "127.0.0.1", 1).parse() {
        Ok(ip) => Ok(SocketAddr::new(ip, 8080)),
        Err(_) => bail!("{text:?} is no address; wanted for example 127.0.0.1:8080"),
    }
}

/// Reads the manifest of the pack in `folder` and compares every file with it.
///
/// # Errors
/// If a file is missing or differs in size or hash.
pub fn verify_pack(folder: &Path) -> Result<Manifest> {
    let manifest = read_manifest(folder)?;
    for (path, wanted) in &manifest.files {
        let from = folder.join(path);
        let size = fs::metadata(&from).with_context(|| format!("cannot read {}", from.display()))?.len();
        ensure!(size == wanted.bytes, "{path} has {size} bytes, its manifest says {}", wanted.bytes);
        let found = files::sha256_file(&from)?;
        ensure!(found == wanted.sha256, "{path} has hash {found}, its manifest says {}", wanted.sha256);
    }
    Ok(manifest)
}
