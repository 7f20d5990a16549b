//! Every WGSL file parses and validates, follows the conventions of `shaders/README.md`, and its structs lie in
//! memory as their Rust twins do. A shader that only a user's browser would reject fails here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests assert by panicking")]

use std::mem::offset_of;
use std::path::{Path, PathBuf};

use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{Module, TypeInner};
use web::gpu::pipeline::{DecodeParams, EncodeParams, Entry, Hit, LatentConstants};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../shaders")
}

fn parse(source: &str) -> Result<Module, String> {
    let module = naga::front::wgsl::parse_str(source).map_err(|e| e.emit_to_string(source))?;
    Validator::new(ValidationFlags::all(), Capabilities::empty())
        .validate(&module)
        .map_err(|e| e.emit_to_string(source))?;
    Ok(module)
}

fn shader(stem: &str) -> Module {
    let path = folder().join(format!("{stem}.wgsl"));
    parse(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn every_shader_is_valid_and_listed() {
    let readme = std::fs::read_to_string(folder().join("README.md")).unwrap();
    let mut n_checked = 0;
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "wgsl") {
            continue;
        }
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let module =
            parse(&std::fs::read_to_string(&path).unwrap()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(module.entry_points.len(), 1, "{name}: one operation a file");
        assert_eq!(module.entry_points[0].name, "main", "{name}: the entry point is main");
        let size = module.entry_points[0].workgroup_size;
        assert!(size.iter().product::<u32>() <= 256, "{name}: {size:?} is above the default limit");
        let mut bindings: Vec<(u32, u32)> = module
            .global_variables
            .iter()
            .filter_map(|(_, v)| v.binding)
            .map(|b| (b.group, b.binding))
            .collect();
        bindings.sort_unstable();
        assert!(bindings.iter().map(|b| b.0).all(|group| group == 0), "{name}: all bindings in group 0");
        assert!(bindings.iter().map(|b| b.1).eq(0..bindings.len() as u32), "{name}: bindings count from 0");
        assert!(readme.contains(&format!("`{name}`")), "{name} is missing from shaders/README.md");
        n_checked += 1;
    }
    assert!(n_checked >= 2, "found {n_checked} shaders");
}

#[test]
fn the_check_rejects_what_a_browser_would() {
    assert!(parse("fn f() -> u32 { return 1.0; }").is_err());
    assert!(parse("@group(0) @binding(0) var<storage, read> a: array<f32>; fn f() { a[0] = 1.0; }").is_err());
}

/// The members of struct `name` with their offsets, and its size.
fn layout(module: &Module, name: &str) -> (Vec<(String, usize)>, usize) {
    let found = module.types.iter().find(|(_, t)| t.name.as_deref() == Some(name));
    let Some((_, ty)) = found else { panic!("no struct {name}") };
    let TypeInner::Struct { members, span } = &ty.inner else { panic!("{name} is not a struct") };
    (members.iter().map(|m| (m.name.clone().unwrap(), m.offset as usize)).collect(), *span as usize)
}

macro_rules! assert_twins {
    ($module:expr, $wgsl:literal, $rust:ty, [$($field:ident),+]) => {
        let rust = vec![$((stringify!($field).to_owned(), offset_of!($rust, $field))),+];
        assert_eq!(layout($module, $wgsl), (rust, size_of::<$rust>()), concat!($wgsl, " against its Rust twin"));
    };
}

#[test]
fn structs_lie_in_memory_as_in_rust() {
    let encode = shader("encode");
    assert_twins!(
        &encode,
        "Params",
        EncodeParams,
        [n_rows, width_vec4, n_latents, first_latent, capacity, pad0, pad1, pad2]
    );
    assert_twins!(&encode, "Latent", LatentConstants, [bias, threshold, margin_scale, margin_offset]);
    assert_twins!(&encode, "Hit", Hit, [row, latent, z]);
    assert_eq!(layout(&encode, "Found").0, [("count".to_owned(), 0), ("hits".to_owned(), 4)]);
    let decode = shader("decode");
    assert_twins!(&decode, "Params", DecodeParams, [n_rows, width_vec4, first_latent, pad0]);
    assert_twins!(&decode, "Entry", Entry, [latent, value]);
}
