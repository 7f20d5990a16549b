//! From text to a store: tokens through the language model, taps into shards.
