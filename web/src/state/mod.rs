//! What the page knows and how it is shown, in plain Rust that ordinary tests reach.
//!
//! - [`address`]: every state of the page as a URL fragment; [`list`]: sorting, filtering and searching latents;
//! - [`load`]: data that may still be coming or may have failed; [`choice`]: which backend, and why;
//! - [`encoded`]: an encoded text from both sides, tokens and latents;
//! - [`shade`]: activations as colours that keep text readable; [`chart`]: histograms as bars;
//! - [`flow`]: a text across layers; [`flow_shapes`]: its maps and ribbons as paths;
//! - [`words`]: tokens as visible text; [`figures`]: numbers as people read them.

pub mod address;
pub mod chart;
pub mod choice;
pub mod encoded;
pub mod figures;
pub mod flow;
pub mod flow_shapes;
pub mod list;
pub mod load;
pub mod shade;
pub mod words;
