//! The page's entry point.

/// Draws the page.
#[cfg(target_arch = "wasm32")]
fn main() {
    web::mount();
}

/// The page is built for the browser; natively there is nothing to run.
#[cfg(not(target_arch = "wasm32"))]
fn main() {
    eprintln!("The explorer runs in a browser: build it with `trunk build --release`.");
}
