//! The fast CPU backend: blocked f32 products on all cores.
