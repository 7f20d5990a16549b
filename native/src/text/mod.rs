//! Reading text files of every supported kind as a stream of documents, in bounded memory.
//!
//! `find` walks folders, `read` opens one file and yields its documents, `shape` cuts and unwraps text.
//! What cannot be used is counted, never fatal: broken records, empty documents, invalid UTF-8.

mod find;
mod read;
mod shape;

pub use find::{Compression, Kind, TextSource, find};
pub use read::{Documents, ReadOptions};
