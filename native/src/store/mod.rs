//! Activation stores on disk: shards, manifest, reader and writer.
