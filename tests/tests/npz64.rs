//! Archives of arrays beyond 4 GiB, as Gemma Scope's widest autoencoders are: zip64 records, without the gigabytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use std::io::{self, Read, Seek, SeekFrom};

use conformance::golden;
use shared::Sae;
use shared::format::gemma_scope;

/// A file that is zeros where no piece lies.
struct Sparse {
    pieces: Vec<(u64, Vec<u8>)>,
    length: u64,
    at: u64,
    read: u64,
}

impl Read for Sparse {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = usize::try_from((self.length - self.at.min(self.length)).min(out.len() as u64)).unwrap();
        for (i, byte) in out[..n].iter_mut().enumerate() {
            let at = self.at + i as u64;
            let piece = self.pieces.partition_point(|(start, _)| *start <= at).checked_sub(1);
            let inside = piece
                .map(|p| &self.pieces[p])
                .and_then(|(start, bytes)| bytes.get(usize::try_from(at - start).ok()?));
            *byte = inside.copied().unwrap_or(0);
        }
        self.at += n as u64;
        self.read += n as u64;
        Ok(n)
    }
}

impl Seek for Sparse {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => i128::from(at),
            SeekFrom::End(by) => i128::from(self.length) + i128::from(by),
            SeekFrom::Current(by) => i128::from(self.at) + i128::from(by),
        };
        self.at = u64::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}

/// A stored member: its bytes, and how many zeros lie behind them.
struct Member {
    name: &'static str,
    bytes: Vec<u8>,
    zeros: u64,
}

/// CRC-32 of zip (APPNOTE 4.4.7): reflected, polynomial 0xEDB88320.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
    })
}

fn le(parts: &[(u64, usize)]) -> Vec<u8> {
    parts.iter().flat_map(|&(value, n)| value.to_le_bytes()[..n].to_vec()).collect()
}

/// An archive whose every size and offset is in a zip64 record (APPNOTE 4.3.14, 4.3.15, 4.5.3); `claims` are added to the sizes
/// that are said.
fn archive(members: &[Member], claims: u64) -> Sparse {
    const BIG: (u64, usize) = (0xFFFF_FFFF, 4);
    let (mut pieces, mut directory, mut at) = (Vec::new(), Vec::new(), 0u64);
    for Member { name, bytes, zeros } in members {
        let (crc, size) = (u64::from(crc32(bytes)), bytes.len() as u64 + zeros + claims);
        let (start, length) = (at, name.len() as u64);
        let common = [(45, 2), (0, 2), (0, 2), (0, 4), (crc, 4), BIG, BIG, (length, 2)];
        let mut local = le(&[(0x0403_4B50, 4)]);
        local.extend(le(&common));
        local.extend(le(&[(20, 2)]));
        local.extend(name.as_bytes());
        local.extend(le(&[(1, 2), (16, 2), (size, 8), (size, 8)]));
        local.extend(bytes);
        at += local.len() as u64 + zeros;
        pieces.push((start, local));
        directory.extend(le(&[(0x0201_4B50, 4), (45, 2)]));
        directory.extend(le(&common));
        directory.extend(le(&[(28, 2), (0, 2), (0, 2), (0, 2), (0, 4), BIG]));
        directory.extend(name.as_bytes());
        directory.extend(le(&[(1, 2), (24, 2), (size, 8), (size, 8), (start, 8)]));
    }
    let (n, length, end) = (members.len() as u64, directory.len() as u64, at + directory.len() as u64);
    directory.extend(le(&[(0x0606_4B50, 4), (44, 8), (45, 2), (45, 2), (0, 4), (0, 4), (n, 8), (n, 8)]));
    directory.extend(le(&[(length, 8), (at, 8), (0x0706_4B50, 4), (0, 4), (end, 8), (1, 4)]));
    directory.extend(le(&[(0x0605_4B50, 4), (0, 2), (0, 2), (0xFFFF, 2), (0xFFFF, 2), BIG, BIG, (0, 2)]));
    let length = at + directory.len() as u64;
    pieces.push((at, directory));
    Sparse { pieces, length, at: 0, read: 0 }
}

/// A `.npy` of `<f4` values given row by row, in either order.
fn npy(name: &'static str, shape: &[usize], rows: &[f32], fortran: bool) -> Member {
    let sizes: String = shape.iter().map(|n| format!("{n},")).collect();
    let order = if fortran { "True" } else { "False" };
    let text = format!("{{'descr': '<f4', 'fortran_order': {order}, 'shape': ({sizes})}}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend(u16::try_from(text.len()).unwrap().to_le_bytes());
    bytes.extend(text.as_bytes());
    let cols = shape[shape.len() - 1];
    let value = |i: usize| {
        if fortran { rows[i % (rows.len() / cols) * cols + i / (rows.len() / cols)] } else { rows[i] }
    };
    bytes.extend((0..rows.len()).flat_map(|i| value(i).to_le_bytes()));
    Member { name, bytes, zeros: 0 }
}

fn sae() -> Sae {
    let goldens = golden::numpy().unwrap();
    goldens.into_iter().find(|g| g.name == "transcoder").unwrap().sae
}

fn members(sae: &Sae, fortran: bool) -> Vec<Member> {
    let (d_in, d_out, n) = (sae.dims().d_in, sae.dims().d_out, sae.dims().n_latents);
    let columns: Vec<f32> = (0..d_in * n).map(|i| sae.w_enc()[i % n * d_in + i / n]).collect();
    let threshold: Vec<f32> = (0..n).map(|i| sae.activation().threshold(i).unwrap()).collect();
    vec![
        npy("W_enc.npy", &[d_in, n], &columns, fortran),
        npy("W_dec.npy", &[n, d_out], sae.w_dec(), fortran),
        npy("b_enc.npy", &[n], sae.b_enc(), false),
        npy("b_dec.npy", &[d_out], sae.b_dec(), false),
        npy("threshold.npy", &[n], &threshold, false),
    ]
}

#[test]
fn zip64_records_and_both_orders_are_read() {
    for fortran in [false, true] {
        assert_eq!(gemma_scope::read(archive(&members(&sae(), fortran), 0)).unwrap(), sae(), "{fortran}");
    }
}

/// Five gibibytes of something else stand before the arrays, so that their offsets need more than 32 bits; nothing of it is
/// read.
#[test]
fn arrays_beyond_four_gibibytes_are_found() {
    let mut all = members(&sae(), true);
    all.insert(0, Member { name: "notes.npy", bytes: b"whatever".to_vec(), zeros: 5 << 30 });
    let mut file = archive(&all, 0);
    assert!(file.length > 5 << 30);
    assert_eq!(gemma_scope::read(&mut file).unwrap(), sae());
    assert!(file.read < 1 << 20, "{} bytes were read", file.read);
}

#[test]
fn sizes_that_the_file_does_not_have_are_refused() {
    for claims in [1, 4096, 1 << 33, 1 << 62, u64::MAX >> 1] {
        assert!(gemma_scope::read(archive(&members(&sae(), false), claims)).is_err(), "{claims} more");
    }
    let whole = archive(&members(&sae(), false), 0);
    for cut in [1, 22, 42, 98, 150] {
        let mut file = archive(&members(&sae(), false), 0);
        file.length = whole.length - cut;
        assert!(gemma_scope::read(file).is_err(), "cut by {cut}");
    }
}
