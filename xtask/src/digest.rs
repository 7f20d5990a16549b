//! SHA-256 of files and of folders.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// Lower-case hexadecimal SHA-256 of bytes.
pub(crate) fn of_bytes(bytes: &[u8]) -> String {
    hex(Sha256::digest(bytes).as_slice())
}

/// Lower-case hexadecimal SHA-256 of a file, read in pieces.
pub(crate) fn of_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0u8; 1 << 20]);
    loop {
        match file.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))? {
            0 => return Ok(hex(hasher.finalize().as_slice())),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// SHA-256 over the sorted names of the files in a folder and their own digests: one number for the whole.
///
/// Names are relative to the folder, with `/` between parts on every platform.
pub(crate) fn of_folder(folder: &Path) -> Result<String> {
    let mut lines = Vec::new();
    collect(folder, "", &mut lines)?;
    lines.sort_unstable();
    Ok(of_bytes(lines.concat().as_bytes()))
}

fn collect(folder: &Path, prefix: &str, lines: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry.with_context(|| format!("cannot list {}", folder.display()))?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            collect(&entry.path(), &format!("{name}/"), lines)?;
        } else {
            lines.push(format!("{name} {}\n", of_file(&entry.path())?));
        }
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_s_digest_sees_names_and_contents() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("sub/a"), "abc").unwrap();
        fs::write(folder.path().join("b"), "").unwrap();
        let first = of_folder(folder.path()).unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(first, of_bytes(format!("b {}\nsub/a {abc}\n", of_bytes(b"")).as_bytes()));
        fs::rename(folder.path().join("b"), folder.path().join("c")).unwrap();
        let renamed = of_folder(folder.path()).unwrap();
        fs::write(folder.path().join("sub/a"), "abd").unwrap();
        assert!(first != renamed && renamed != of_folder(folder.path()).unwrap());
    }
}
