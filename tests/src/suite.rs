//! The one conformance suite every [`Forward`] backend runs: CPU, GPU, and the browser.
//!
//! ```ignore
//! let report = suite::run(async |sae| Ok::<_, Infallible>(Reference::new(sae))).await;
//! assert!(report.passed(), "{report}");
//! ```
//!
//! Judged by committed goldens of independent programs and by [`shared::reference`] on seeded dictionaries of odd sizes. Every
//! seeded dictionary has thresholds placed within half an f32 rounding step of a pre-activation, so a backend that decides
//! in plain f32 fails.

use std::fmt;

use shared::{
    Activation, Codes, CodesBuilder, Forward, RowScaling, Rows, Sae, SaeParts, ShapeError, reference,
};

use crate::compare::{self, Agreement};
use crate::golden::{self, Golden};

/// How close values must be, relative to the largest in the batch (and to 1).
pub const TOLERANCE: f64 = 1e-5;

/// One check and how it went.
#[derive(Debug, Clone)]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// The agreement, or what is wrong.
    pub outcome: Result<Agreement, String>,
}

/// Everything the suite found.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// All checks in the order they ran.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether at least one check ran and none failed.
    #[must_use]
    pub fn passed(&self) -> bool {
        !self.checks.is_empty() && self.failures().next().is_none()
    }

    /// The checks that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.outcome.is_err())
    }

    fn add(&mut self, name: impl Into<String>, outcome: Result<Agreement, String>) {
        self.checks.push(Check { name: name.into(), outcome });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let worst =
            self.checks.iter().filter_map(|c| c.outcome.as_ref().ok()).map(|a| a.share).fold(0.0, f64::max);
        let failed = self.failures().count();
        writeln!(
            f,
            "{} checks, {failed} failed, worst share of the tolerance {worst:.3}",
            self.checks.len()
        )?;
        for check in self.failures() {
            if let Err(reason) = &check.outcome {
                writeln!(f, "  {}: {reason}", check.name)?;
            }
        }
        Ok(())
    }
}

/// Runs every check on the backends `make` builds, one for each dictionary. Needs no I/O, clock or threads.
pub async fn run<B: Forward, E: fmt::Display>(make: impl AsyncFn(Sae) -> Result<B, E>) -> Report {
    let mut report = Report::default();
    match golden::numpy().and_then(|numpy| Ok((numpy, golden::saelens()?))) {
        Err(error) => report.add("goldens", Err(error.to_string())),
        Ok((numpy, saelens)) => {
            for golden in numpy.iter().chain(&saelens) {
                match make(golden.sae.clone()).await {
                    Ok(backend) => check_golden(&mut report, golden, &backend).await,
                    Err(error) => report.add(format!("{}: build", golden.name), Err(error.to_string())),
                }
            }
        }
    }
    for case in seeded_cases() {
        match make(case.sae.clone()).await {
            Ok(backend) => check_case(&mut report, &case, &backend).await,
            Err(error) => report.add(format!("{}: build", case.name), Err(error.to_string())),
        }
    }
    report
}

async fn check_golden<B: Forward>(report: &mut Report, golden: &Golden, backend: &B) {
    let Golden { name, sae, x, features, reconstruction } = golden;
    let outcome = async {
        let codes = encode(backend, sae, x).await?;
        let wanted = sparse(features, sae.dims().n_latents)?;
        compare::same_codes(&wanted, &codes, TOLERANCE).map_err(text)
    };
    report.add(format!("{name}: encode"), outcome.await);
    let outcome = async {
        let codes = sparse(features, sae.dims().n_latents)?;
        let rows = Rows::new(x, sae.dims().d_in).map_err(text)?;
        let found = backend.decode(rows, &codes).await.map_err(text)?;
        compare::close(reconstruction, &found, TOLERANCE).map_err(text)
    };
    report.add(format!("{name}: decode"), outcome.await);
}

/// A dictionary, inputs, and a name that says which sizes they have.
#[derive(Debug, Clone)]
pub struct Case {
    /// Sizes and activation.
    pub name: String,
    /// The dictionary.
    pub sae: Sae,
    /// Inputs `[n_rows, d_in]`.
    pub x: Vec<f32>,
}

async fn check_case<B: Forward>(report: &mut Report, case: &Case, backend: &B) {
    let Case { name, sae, x } = case;
    let dims = sae.dims();
    if backend.dims() != dims {
        report.add(format!("{name}: dims"), Err(format!("{:?} for {dims:?}", backend.dims())));
    }
    let wanted = match Rows::new(x, dims.d_in).and_then(|rows| reference::encode(sae, rows)) {
        Ok(codes) => codes,
        Err(error) => return report.add(format!("{name}: reference"), Err(text(error))),
    };
    let outcome =
        async { compare::same_codes(&wanted, &encode(backend, sae, x).await?, TOLERANCE).map_err(text) };
    report.add(format!("{name}: encode"), outcome.await);
    let outcome = async {
        let first = Rows::new(&x[..dims.d_in], dims.d_in).map_err(text)?;
        let wanted = reference::encode(sae, first).map_err(text)?;
        compare::same_codes(&wanted, &encode(backend, sae, first.data()).await?, TOLERANCE).map_err(text)
    };
    report.add(format!("{name}: encode a single row"), outcome.await);
    let outcome = async {
        let rows = Rows::new(x, dims.d_in).map_err(text)?;
        let found = backend.decode(rows, &wanted).await.map_err(text)?;
        let decoded = reference::decode(sae, rows, &wanted).map_err(text)?;
        compare::close(&decoded, &found, TOLERANCE).map_err(text)?;
        rows_decode_alone(backend, sae, rows, &wanted).await
    };
    report.add(format!("{name}: decode"), outcome.await);
    report.add(format!("{name}: nothing and wrong widths"), edges(sae, backend).await);
}

/// A row decodes to the same whatever rows are beside it: statistics belong to it alone. Compared row by row, so that a
/// small row's error does not hide behind a large row's values.
async fn rows_decode_alone<B: Forward>(
    backend: &B,
    sae: &Sae,
    x: Rows<'_>,
    codes: &Codes,
) -> Result<Agreement, String> {
    let mut worst = Agreement { n: 0, worst: 0, share: 0.0 };
    for (i, (latents, values)) in codes.iter().enumerate() {
        let mut builder = CodesBuilder::new(codes.n_latents());
        latents.iter().zip(values).for_each(|(&latent, &value)| builder.push(latent, value));
        builder.end_row().map_err(text)?;
        let (row, codes) = (x.slice(i, i + 1), builder.finish());
        let wanted = reference::decode(sae, row, &codes).map_err(text)?;
        let found = backend.decode(row, &codes).await.map_err(text)?;
        let scale = wanted.iter().fold(f32::MIN_POSITIVE, |m, w| m.max(w.abs()));
        let over = |values: &[f32]| values.iter().map(|v| v / scale).collect::<Vec<_>>();
        let agreement = compare::close(&over(&wanted), &over(&found), TOLERANCE);
        let agreement = agreement.map_err(|e| format!("row {i} alone: {e}"))?;
        worst = if agreement.share > worst.share { agreement } else { worst };
        worst.n += agreement.n;
    }
    Ok(worst)
}

/// An empty batch comes back empty; rows or codes of another width, or of another number, are an error.
async fn edges<B: Forward>(sae: &Sae, backend: &B) -> Result<Agreement, String> {
    let dims = sae.dims();
    let none = encode(backend, sae, &[]).await?;
    let no_rows = Rows::new(&[], dims.d_in).map_err(text)?;
    let nothing = backend.decode(no_rows, &none).await.map_err(text)?;
    if none.n_rows() != 0 || !nothing.is_empty() {
        return Err(format!("an empty batch became {} rows and {} values", none.n_rows(), nothing.len()));
    }
    let wide = vec![0.5; dims.d_in + 1];
    if backend.encode(Rows::new(&wide, dims.d_in + 1).map_err(text)?).await.is_ok() {
        return Err("rows of a wrong width were encoded".to_owned());
    }
    let mut foreign = CodesBuilder::new(dims.n_latents + 1);
    foreign.end_row().map_err(text)?;
    let narrow = Rows::new(&wide[..dims.d_in], dims.d_in).map_err(text)?;
    if backend.decode(narrow, &foreign.finish()).await.is_ok() {
        return Err("codes of a wrong width were decoded".to_owned());
    }
    let mut silent = CodesBuilder::new(dims.n_latents);
    silent.end_row().map_err(text)?;
    let silent = silent.finish();
    let wide = Rows::new(&wide, dims.d_in + 1).map_err(text)?;
    if backend.decode(no_rows, &silent).await.is_ok() || backend.decode(wide, &silent).await.is_ok() {
        return Err("codes were decoded with vectors they cannot be of".to_owned());
    }
    // Without anything that reads the vector, a row without active latents is the decoder's bias.
    let found = backend.decode(narrow, &silent).await.map_err(text)?;
    let (wanted, tolerance) = if sae.w_skip().is_none() && sae.rows().is_none() {
        (sae.b_dec().to_vec(), 0.0)
    } else {
        (reference::decode(sae, narrow, &silent).map_err(text)?, TOLERANCE)
    };
    compare::close(&wanted, &found, tolerance).map_err(text)
}

async fn encode<B: Forward>(backend: &B, sae: &Sae, x: &[f32]) -> Result<Codes, String> {
    backend.encode(Rows::new(x, sae.dims().d_in).map_err(text)?).await.map_err(text)
}

fn text(error: impl fmt::Display) -> String {
    error.to_string()
}

/// Dense latents `[n_rows, n]` as codes; zeros are silent.
fn sparse(dense: &[f32], n_latents: usize) -> Result<Codes, String> {
    let mut builder = CodesBuilder::new(n_latents);
    for row in Rows::new(dense, n_latents).map_err(text)? {
        for (latent, &value) in (0u32..).zip(row) {
            if value != 0.0 {
                builder.push(latent, value);
            }
        }
        builder.end_row().map_err(text)?;
    }
    Ok(builder.finish())
}

/// What the seeded dictionaries are: an activation, perhaps with a skip connection or scaled rows.
const KINDS: [&str; 10] = [
    "jumprelu",
    "relu",
    "top-1",
    "top-k",
    "top-n",
    "jumprelu skip",
    "jumprelu standardised",
    "jumprelu norm",
    "top-k standardised",
    "relu standardised skip",
];

/// Dictionaries of odd sizes over every activation; sizes fall on both sides of usual tile widths.
#[must_use]
pub fn seeded_cases() -> Vec<Case> {
    // d_in, n, d_out, rows
    let sizes = [
        (1, 1, 1, 1),
        (3, 5, 3, 2),
        (17, 33, 17, 7),
        (64, 256, 64, 65),
        (63, 257, 63, 64),
        (130, 700, 130, 33),
        (20, 45, 31, 9),
        (257, 31, 5, 17),
    ];
    let mut cases = Vec::new();
    for (seed, (d_in, n, d_out, n_rows)) in (1u64..).zip(sizes) {
        for kind in KINDS {
            // The unbiased deviation of a single value does not exist.
            if d_in == 1 && kind.contains("standardised") {
                continue;
            }
            let mut random = Random(seed);
            let mut x = random.normal(n_rows * d_in, 1.0);
            if kind.contains("standardised") || kind.contains("norm") {
                rescale(&mut x, d_in);
            }
            if let Ok(sae) = seeded_sae(&mut random, (d_in, n, d_out), kind, &x) {
                cases.push(Case { name: format!("{kind} {d_in}x{n}->{d_out}, {n_rows} rows"), sae, x });
            }
        }
    }
    cases
}

fn seeded_sae(
    random: &mut Random,
    (d_in, n, d_out): (usize, usize, usize),
    kind: &str,
    x: &[f32],
) -> Result<Sae, ShapeError> {
    #[expect(clippy::cast_precision_loss, reason = "small sizes")]
    let spread = 1.0 / (d_in as f64).sqrt();
    let mut parts = SaeParts {
        d_in,
        d_out,
        w_enc: random.normal(n * d_in, spread),
        b_enc: random.normal(n, 0.3),
        w_dec: random.normal(n * d_out, 0.5),
        b_dec: random.normal(d_out, 0.5),
        activation: Activation::Relu,
        w_skip: kind.contains("skip").then(|| random.normal(d_out * d_in, spread)),
        rows: match kind {
            "top-k standardised" => RowScaling::LAYER_NORM,
            kind if kind.contains("standardised") => RowScaling::Standardise { eps: 0.125 },
            kind if kind.contains("norm") => RowScaling::Norm,
            _ => RowScaling::None,
        },
    };
    parts.activation = match kind.split(' ').next() {
        Some("top-1") => Activation::TopK { k: 1 },
        Some("top-k") => Activation::TopK { k: n.div_ceil(7) },
        Some("top-n") => Activation::TopK { k: n },
        Some("jumprelu") => {
            Activation::JumpRelu { threshold: random.normal(n, 0.5).iter().map(|t| t.abs()).collect() }
        }
        _ => Activation::Relu,
    };
    // Latents in pairs of equal rows tie in every row of a top-k dictionary.
    if kind.starts_with("top") && n > 2 {
        let (first, rest) = parts.w_enc.split_at_mut(d_in);
        rest[(n - 2) * d_in..].copy_from_slice(first);
        parts.b_enc[n - 1] = parts.b_enc[0];
    }
    let sae = Sae::new(parts)?;
    let mut parts = sae.clone().into_parts();
    if let Activation::JumpRelu { threshold } = &mut parts.activation {
        let x = sae.rows().scaled(Rows::new(x, d_in)?);
        // Half of the thresholds land on the f32 next to a pre-activation of some row.
        for (latent, t) in threshold.iter_mut().enumerate().step_by(2) {
            let row = latent % (x.len() / d_in);
            #[expect(clippy::cast_possible_truncation, reason = "the rounding is the point")]
            let z = reference::pre_activation(&sae, &x[row * d_in..(row + 1) * d_in], latent) as f32;
            *t = z.max(0.0);
        }
    }
    Sae::new(parts)
}

/// Rows of every size, off centre, and among them one that is constant and one so small that an ε of 1e-5 shows.
fn rescale(x: &mut [f32], d_in: usize) {
    for (i, row) in x.chunks_exact_mut(d_in).enumerate() {
        let (size, centre) = [(1.0, 0.5), (30.0, -7.0), (2e-5, 0.0), (0.25, 3.0), (0.0, 2.0)][i % 5];
        row.iter_mut().for_each(|value| *value = size * *value + centre);
    }
}

/// A small generator (SplitMix64) so that cases are the same on every platform.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        #[expect(clippy::cast_precision_loss, reason = "53 bits are kept")]
        let unit = ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64;
        unit
    }

    /// Values of mean 0 and the given spread (a sum of four uniforms: no transcendental function, so no platform differs).
    fn normal(&mut self, n: usize, spread: f64) -> Vec<f32> {
        #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
        let value = |sum: f64| ((sum - 2.0) * 3f64.sqrt() * spread) as f32;
        (0..n).map(|_| value((0..4).map(|_| self.next()).sum())).collect()
    }
}
