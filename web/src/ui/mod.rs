//! The page: components over [`crate::state`], nothing that could be tested without a browser.
//!
//! - [`app`]: the frame around every page; [`context`]: what all components share, and navigation;
//! - [`overview`], [`list`], [`feature`], [`try_it`], [`flow`], [`selftest`]: the pages; `flow_…`: the parts of the one across layers;
//! - [`charts`], [`tokens`], [`parts`]: what pages are made of; [`keys`]: the keyboard.

#![expect(unreachable_pub, reason = "the component macro makes the properties of private components public")]

mod app;
mod charts;
mod context;
mod examples;
mod feature;
mod flow;
mod flow_maps;
mod flow_panel;
mod flow_ribbons;
mod flow_table;
mod keys;
mod list;
mod overview;
mod parts;
mod selftest;
mod tokens;
mod try_it;
mod try_panel;

use leptos::prelude::*;

/// Draws the page into the document and keeps it going.
pub fn mount() {
    std::panic::set_hook(Box::new(|info| {
        console_error_panic_hook::hook(info);
        // A page that stopped must not look as if it worked.
        if let Some(note) = document().get_element_by_id("fatal") {
            note.set_text_content(Some(&format!("The page stopped: {info}. Reload it to go on.")));
        }
    }));
    if let Some(boot) = document().get_element_by_id("boot") {
        boot.remove();
    }
    mount_to_body(app::App);
}
