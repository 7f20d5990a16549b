//! One file a command: arguments with their help, and a thin `run` over the library.

pub(crate) mod bench;
pub(crate) mod convert;
pub(crate) mod doctor;
pub(crate) mod encode;
pub(crate) mod eval;
pub(crate) mod features;
pub(crate) mod harvest;
pub(crate) mod inspect;
pub(crate) mod lens;
pub(crate) mod lm;
pub(crate) mod selftest;
pub(crate) mod site;
pub(crate) mod train;
