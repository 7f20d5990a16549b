//! Reading text files of every supported kind as a stream of documents, in bounded memory.
//!
//! `find` walks folders and lists data sets of the hub, `read` opens one file and yields its documents (`json`, `parquet` and
//! `arrow` know the formats), `shape` cuts and unwraps text. What cannot be used is counted, never fatal: broken records,
//! empty documents, invalid UTF-8.

mod arrow;
mod cell;
mod find;
mod guard;
mod json;
mod parquet;
mod read;
mod shape;

#[cfg(test)]
pub(crate) use find::on_hub;
pub use find::{Compression, Kind, Place, TextSource, find};
pub use read::{Document, Documents, ReadOptions};
