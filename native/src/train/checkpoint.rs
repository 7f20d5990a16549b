//! Everything a run needs to go on to the same bits: one file, replaced as a whole.
//!
//! `checkpoint/state.safetensors` holds parameters, second moments, the steps that last touched each latent
//! and the rows in which it last fired; its header holds, as JSON, the step, the position in the data, the
//! guard, and what configuration and data the run belongs to. Schedules follow from the step and the data
//! order from the position, so there is no random state besides.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use safetensors::tensor::{Metadata, TensorInfo, TensorView};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use shared::config::train::{EncoderPrecision, Products, Route, TrainConfig};
use shared::metrics::Dead;

use super::guard::Guard;
use super::init;
use super::normalise::{Normalisation, Scaling, row_scaling};
use super::order::Position;
use super::params::{Latents, Moments, Params, Tensors};
use super::pressure::Pressure;
use super::step::Trainer;
use crate::files::write_atomic;

/// The state of a run between two steps.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// Parameters, moments, step.
    pub trainer: Trainer,
    /// The next row to train on.
    pub position: Position,
    /// Bad batches so far.
    pub guard: Guard,
    /// When each latent last fired.
    pub dead: Dead,
    /// The scale of the data, as measured at the start.
    pub scaling: Scaling,
    /// The sparsity term.
    pub pressure: Pressure,
}

/// The version of the file.
const VERSION: u32 = 5;

/// What the header of a checkpoint says.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u32,
    d_in: usize,
    step: u64,
    rows_seen: u64,
    position: Position,
    guard: Guard,
    pressure: Pressure,
    /// Bits of BatchTopK's running threshold.
    threshold: u32,
    identity: Value,
}

/// What a run is: its resolved configuration and its data. A checkpoint of another run is refused.
///
/// # Errors
/// If the configuration cannot be written as JSON.
pub fn identity(config: &TrainConfig, data: &Value) -> Result<Value> {
    // How often state is saved and logged, and how the encoder product is found, does not change the result.
    let config = TrainConfig {
        log_every: 1,
        checkpoint_every: 1,
        checkpoint_minutes: 1.0,
        tensorboard: false,
        encoder_precision: EncoderPrecision::F32,
        products: Products::default(),
        route: Route::default(),
        deterministic: true,
        ..config.clone()
    };
    // Through text, so that it compares equal to what is read back.
    let text = serde_json::to_string(&serde_json::json!({ "config": config, "data": data }))?;
    Ok(serde_json::from_str(&text)?)
}

/// The file a run in folder `out` keeps its state in.
#[must_use]
pub fn path(out: &Path) -> PathBuf {
    out.join("checkpoint").join("state.safetensors")
}

/// The file of the checkpoint to go back to when what was learned since turns out bad.
fn earlier_path(out: &Path) -> PathBuf {
    out.join("checkpoint").join("earlier.safetensors")
}

/// Keeps the checkpoint of `out` as the one to go back to. Costs no copy where the file system knows hard links.
///
/// # Errors
/// If the disk refuses.
pub fn keep(out: &Path) -> Result<()> {
    let (from, to) = (path(out), earlier_path(out));
    let sibling = to.with_extension("part");
    let linked = fs::remove_file(&sibling).or_else(|error| match error.kind() {
        ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    });
    linked
        .and_then(|()| fs::hard_link(&from, &sibling).or_else(|_| fs::copy(&from, &sibling).map(|_| ())))
        .and_then(|()| fs::rename(&sibling, &to))
        .with_context(|| format!("cannot keep {} as {}", from.display(), to.display()))
}

/// Reads what [`keep`] kept, `None` when there is nothing.
///
/// # Errors
/// As [`load`].
pub fn load_earlier(
    out: &Path,
    config: &TrainConfig,
    widths: [usize; 2],
    identity: &Value,
) -> Result<Option<State>> {
    load_from(&earlier_path(out), config, widths, identity)
}

/// Writes `state`, replacing the last checkpoint once it is complete.
///
/// # Errors
/// If the disk refuses; the last checkpoint is then untouched.
pub fn save(out: &Path, state: &State, identity: &Value) -> Result<()> {
    let header = Header {
        version: VERSION,
        d_in: state.trainer.params.d_in,
        step: state.trainer.step,
        rows_seen: state.dead.n_rows(),
        position: state.position,
        guard: state.guard.clone(),
        pressure: state.pressure.clone(),
        threshold: match state.trainer.params.latents {
            Latents::BatchTopK { threshold, .. } => threshold.to_bits(),
            _ => 0,
        },
        identity: identity.clone(),
    };
    let (params, moments) = (&state.trainer.params.tensors, &state.trainer.moments);
    let groups = [("", Some(params)), ("first.", moments.first.as_ref()), ("second.", Some(&moments.second))];
    let floats = groups.into_iter().filter_map(|(group, tensors)| Some((group, tensors?))).flat_map(
        |(group, tensors)| tensors.named().map(|(name, values)| (format!("{group}{name}"), values)),
    );
    let integers = [
        ("weights_step", &moments.weights_step[..]),
        ("own_step", &moments.own_step[..]),
        ("last_fired", state.dead.last_fired()),
    ];
    let mut views = Vec::new();
    for (name, values) in floats {
        views.push((name, TensorView::new(Dtype::F32, vec![values.len()], bytemuck::cast_slice(values))?));
    }
    for (name, values) in integers {
        views.push((
            name.to_owned(),
            TensorView::new(Dtype::U64, vec![values.len()], bytemuck::cast_slice(values))?,
        ));
    }
    let Scaling { inputs, target, .. } = &state.scaling;
    let named = inputs.iter().enumerate().map(|(input, normalisation)| (data_name(input), normalisation));
    let named = named.chain(target.as_ref().map(|target| ("target_data".to_owned(), target)));
    let measured: Vec<(String, Vec<f64>)> =
        named.map(|(name, normalisation)| (name, flat(normalisation))).collect();
    for (name, data) in &measured {
        let bytes = bytemuck::cast_slice(data);
        views.push((name.clone(), TensorView::new(Dtype::F64, vec![data.len()], bytes)?));
    }
    let metadata = HashMap::from([("state".to_owned(), serde_json::to_string(&header)?)]);
    // Wider values first, so that each lies at a multiple of its size.
    views.sort_by(|(name_a, a), (name_b, b)| b.dtype().cmp(&a.dtype()).then_with(|| name_a.cmp(name_b)));
    let mut end = 0;
    let infos = views.iter().map(|(name, view)| {
        let start = end;
        end += view.data().len();
        let (dtype, shape) = (view.dtype(), view.shape().to_vec());
        (name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    });
    let header = Metadata::new(Some(metadata), infos.collect())?;
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    // Straight from where the values are: a copy of everything may not fit.
    write_atomic(&path(out), |w| {
        w.write_all(&(header.len() as u64).to_le_bytes())?;
        w.write_all(&header)?;
        views.iter().try_for_each(|(_, view)| w.write_all(view.data()))
    })
}

/// The tensor of what was measured of an input.
fn data_name(input: usize) -> String {
    format!("data.{input}")
}

fn flat(normalisation: &Normalisation) -> Vec<f64> {
    [normalisation.scale, normalisation.limit].iter().chain(&normalisation.mean).copied().collect()
}

/// Reads the checkpoint of a run in `out`, `None` when there is none.
///
/// # Errors
/// If it is damaged, or belongs to another configuration or other data.
pub fn load(out: &Path, config: &TrainConfig, widths: [usize; 2], identity: &Value) -> Result<Option<State>> {
    load_from(&path(out), config, widths, identity)
}

fn load_from(
    path: &Path,
    config: &TrainConfig,
    widths: [usize; 2],
    identity: &Value,
) -> Result<Option<State>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    read(&bytes, config, widths, identity).map(Some).with_context(|| {
        format!("cannot resume from {}; give another --out, or remove it to start again", path.display())
    })
}

fn read(bytes: &[u8], config: &TrainConfig, [d_in, d_out]: [usize; 2], identity: &Value) -> Result<State> {
    let (_, metadata) = SafeTensors::read_metadata(bytes)?;
    let text = metadata.metadata().as_ref().and_then(|m| m.get("state")).context("it has no `state`")?;
    let header: Header = serde_json::from_str(text).context("its `state` cannot be read")?;
    ensure!(header.version == VERSION, "it is of version {}, expected {VERSION}", header.version);
    if header.identity != *identity {
        bail!("it belongs to another run: {}", difference(&header.identity, identity));
    }
    let (n, file) = (config.width, SafeTensors::deserialize(bytes)?);
    let floats = |name: &str, len: usize| -> Result<Vec<f32>> { tensor(&file, name, Dtype::F32, len) };
    let integers = |name: &str| -> Result<Vec<u64>> { tensor(&file, name, Dtype::U64, n) };
    let names = file.names();
    let n_inputs = (0..).map(data_name).take_while(|name| names.contains(&name.as_str())).count();
    let n_layers = init::n_layers(config, n_inputs);
    n.checked_mul(d_in.max(d_out).max(n_layers)).context("width overflows")?;
    let tensors = |group: &str| -> Result<Tensors> {
        let mut tensors = Tensors::zeros(n, d_in, d_out, config.skip).with_thresholds(n_layers);
        for (name, values) in tensors.named_mut() {
            *values = floats(&format!("{group}{name}"), values.len())?;
        }
        Ok(tensors)
    };
    let latents = match init::latents(config) {
        Latents::BatchTopK { k, .. } => Latents::BatchTopK { k, threshold: f32::from_bits(header.threshold) },
        other => other,
    };
    let pre_bias = config.subtracts_bias();
    let encoder_bias = config.encoder_bias;
    let params = Params { d_in, d_out, tensors: tensors("")?, latents, pre_bias, encoder_bias };
    let moments = Moments {
        first: if config.beta1 > 0.0 { Some(tensors("first.")?) } else { None },
        second: tensors("second.")?,
        weights_step: integers("weights_step")?,
        own_step: integers("own_step")?,
    };
    let measured = |name: &str, width: usize| -> Result<Normalisation> {
        let data: Vec<f64> = tensor(&file, name, Dtype::F64, width + 2)?;
        Ok(Normalisation { scale: data[0], limit: data[1], mean: data[2..].to_vec() })
    };
    let target = config.target.map(|_| measured("target_data", d_out)).transpose()?;
    let inputs = (0..n_inputs).map(|input| measured(&data_name(input), d_in));
    let inputs: Vec<_> = inputs.collect::<Result<_>>()?;
    ensure!(!inputs.is_empty(), "it has no tensor `{}`", data_name(0));
    let scaling = Scaling { rows: row_scaling(config.normalise), inputs, target };
    let mut trainer = Trainer::resume(params, moments, header.step);
    trainer.set_precision(config.encoder_precision);
    Ok(State {
        trainer,
        position: header.position,
        guard: header.guard,
        pressure: header.pressure,
        dead: Dead::resume(header.rows_seen, integers("last_fired")?)?,
        scaling,
    })
}

fn tensor<T: bytemuck::Pod>(file: &SafeTensors<'_>, name: &str, dtype: Dtype, len: usize) -> Result<Vec<T>> {
    let view = file.tensor(name).with_context(|| format!("it has no tensor `{name}`"))?;
    let right = view.dtype() == dtype && view.shape() == [len];
    ensure!(right, "tensor `{name}` is {:?} {:?}, expected {dtype:?} [{len}]", view.dtype(), view.shape());
    Ok(view.data().chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect())
}

/// The keys in which two identities differ.
fn difference(found: &Value, wanted: &Value) -> String {
    let mut differences = Vec::new();
    for part in ["config", "data"] {
        let (Some(found), Some(wanted)) = (found[part].as_object(), wanted[part].as_object()) else {
            continue;
        };
        let keys: std::collections::BTreeSet<&String> = found.keys().chain(wanted.keys()).collect();
        for key in keys {
            let show = |v: Option<&Value>| v.map_or_else(|| "nothing".to_owned(), Value::to_string);
            if found.get(key) != wanted.get(key) {
                differences.push(format!(
                    "{key} is {} there, {} here",
                    show(found.get(key)),
                    show(wanted.get(key))
                ));
            }
        }
    }
    differences.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config() -> TrainConfig {
        TrainConfig { width: 3, target_l0: Some(1.0), lr: 0.1 + 0.2, beta1: 0.0, ..TrainConfig::default() }
    }

    fn state() -> State {
        let tensors = Tensors {
            w_enc: vec![1.0, f32::MIN_POSITIVE, 3.0, 4.0, 5.0, 6.0],
            b_enc: vec![0.1; 3],
            w_dec: vec![0.6; 6],
            b_dec: vec![-0.0, 1.0],
            own: [vec![-3.0, -2.5, -2.0], vec![0.0; 3]],
            w_skip: Vec::new(),
        };
        let latents = init::latents(&config());
        let params = Params { d_in: 2, d_out: 2, tensors, latents, pre_bias: true, encoder_bias: true };
        let mut trainer = Trainer::new(params, false);
        trainer.step = 12;
        trainer.moments.weights_step = vec![12, 0, 7];
        State {
            trainer,
            position: Position { epoch: 1, shard: 2, row: 3 },
            guard: Guard::default(),
            dead: Dead::resume(100, vec![100, 0, 50]).unwrap(),
            scaling: Scaling {
                rows: row_scaling(config().normalise),
                inputs: vec![Normalisation { scale: 0.1, mean: vec![0.3, -0.1], limit: f64::INFINITY }],
                target: None,
            },
            pressure: Pressure::new(&config()),
        }
    }

    #[test]
    fn saved_and_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let identity = identity(&config(), &json!({ "sha": "a" })).unwrap();
        assert!(load(folder.path(), &config(), [2; 2], &identity).unwrap().is_none());
        save(folder.path(), &state(), &identity).unwrap();
        assert_eq!(load(folder.path(), &config(), [2; 2], &identity).unwrap(), Some(state()));
    }

    #[test]
    fn another_run_or_a_damaged_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mine = identity(&config(), &json!({ "sha": "a" })).unwrap();
        save(folder.path(), &state(), &mine).unwrap();
        let other = TrainConfig { seed: 5, ..config() };
        let error = load(folder.path(), &other, [2; 2], &identity(&other, &json!({ "sha": "b" })).unwrap());
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.contains("seed is 0 there, 5 here") && error.contains("sha"), "{error}");
        let logged = TrainConfig { log_every: 7, ..config() };
        assert_eq!(identity(&logged, &json!({ "sha": "a" })).unwrap(), mine);

        let bytes = fs::read(path(folder.path())).unwrap();
        for end in [0, 4, 100, bytes.len() / 2, bytes.len() - 1] {
            assert!(read(&bytes[..end], &config(), [2; 2], &mine).is_err(), "truncated at {end}");
        }
        assert!(read(&bytes, &config(), [3; 2], &mine).is_err());
    }
}
