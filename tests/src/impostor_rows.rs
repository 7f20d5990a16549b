//! The faults of impostors that lie in how rows are scaled, and how that is undone.

use shared::row_scaling::Undo;
use shared::{Codes, RowScaling, Rows, Sae, SaeParts, ShapeError, reference};

use crate::impostor::Fault;

/// `sae` without skip connection and scaling of rows.
fn plain(sae: &Sae) -> Result<Sae, ShapeError> {
    Sae::new(SaeParts { w_skip: None, rows: RowScaling::None, ..sae.clone().into_parts() })
}

/// Where `fault` is one of scaling rows: what it encodes in place of `x`, and the dictionary that reads it as it is.
pub(crate) fn scaled_wrongly(
    sae: &Sae,
    fault: Fault,
    x: Rows<'_>,
) -> Result<Option<(Sae, Vec<f32>)>, ShapeError> {
    let scale = |row: &[f32]| -> Option<Vec<f32>> {
        let Undo { scale, shift } = undo(sae.rows(), fault, row);
        let divisor = match (fault, sae.rows()) {
            (Fault::NotScaled, _) => return Some(row.to_vec()),
            (Fault::BiasedDeviation, RowScaling::Standardise { eps }) => scale + f64::from(eps),
            (Fault::UnitNorm, RowScaling::Norm) => scale,
            _ => return None,
        };
        let scaled = row.iter().map(|&x| (f64::from(x) - shift) / divisor.max(f64::MIN_POSITIVE));
        #[expect(clippy::cast_possible_truncation, reason = "vectors are f32")]
        Some(scaled.map(|x| x as f32).collect())
    };
    if x.expect_width("x", sae.dims().d_in).is_err() {
        return Ok(None);
    }
    let rows: Option<Vec<Vec<f32>>> = x.iter().map(scale).collect();
    rows.map(|rows| Ok((plain(sae)?, rows.concat()))).transpose()
}

/// The reconstruction of `sae`, scaled back with `fault`.
pub(crate) fn undone_wrongly(
    sae: &Sae,
    fault: Fault,
    x: Rows<'_>,
    codes: &Codes,
) -> Result<Vec<f32>, ShapeError> {
    sae.check_decode(x, codes)?;
    let (d_in, d_out) = (sae.dims().d_in, sae.dims().d_out);
    let mut out = reference::decode(&plain(sae)?, x, codes)?;
    let mut scaled = vec![0.0; d_in];
    for (i, out) in out.chunks_exact_mut(d_out).enumerate() {
        let row = x.row(i);
        let Undo { scale, shift } =
            undo(sae.rows(), fault, if fault == Fault::StatisticsOfFirstRow { x.row(0) } else { row });
        sae.rows().apply(row, &mut scaled);
        let read = if fault == Fault::SkipOfScaled { &scaled } else { row };
        for (j, out) in out.iter_mut().enumerate() {
            let skip = sae.w_skip().map_or(0.0, |w| reference::dot(&w[j * d_in..(j + 1) * d_in], read));
            let inside = if fault == Fault::SkipUndone { skip } else { 0.0 };
            let value = scale * (f64::from(*out) + inside) + shift + skip - inside;
            #[expect(clippy::cast_possible_truncation, reason = "reconstructions are f32")]
            let value = value as f32;
            *out = value;
        }
    }
    Ok(out)
}

fn undo(rows: RowScaling, fault: Fault, x: &[f32]) -> Undo {
    let Undo { mut scale, mut shift } = rows.undo(x);
    #[expect(clippy::cast_precision_loss, reason = "small sizes")]
    let d = x.len() as f64;
    match (fault, rows) {
        (Fault::BiasedDeviation, RowScaling::Standardise { .. }) => scale *= ((d - 1.0) / d).sqrt(),
        (Fault::EpsUndone, RowScaling::Standardise { eps }) => scale += f64::from(eps),
        (Fault::UnitNorm, RowScaling::Norm) => scale *= d.sqrt(),
        (Fault::NotUndone, _) => (scale, shift) = (1.0, 0.0),
        (Fault::MeanForgotten, _) => shift = 0.0,
        _ => {}
    }
    Undo { scale, shift }
}
