//! An evaluation for people: the Markdown table of `eval.md`.

use std::fmt::Write;

use super::EvalReport;

/// The report as Markdown.
#[must_use]
pub fn markdown(report: &EvalReport) -> String {
    let r = &report.reconstruction;
    let mut rows: Vec<(&str, String, String)> = vec![
        (
            "L0",
            format!("{:.2}", r.l0),
            format!("mean active latents of {}, {} held-out tokens", report.n_latents, r.n_held_out),
        ),
        ("FVU", optional(r.fvu, 4), "fraction of variance unexplained".to_owned()),
        ("dead latents", percent(r.dead_share), format!("never active on {} tokens", r.n_density)),
        ("dense latents", percent(r.dense_share), "active on more than 10 % of tokens".to_owned()),
    ];
    if let Some(limit) = report.max_input_norm {
        let about = format!("vectors longer than {limit:.0}, not trained on and not measured");
        rows.push(("massive activations", report.n_outliers.to_string(), about));
    }
    if let Some(s) = &report.splice {
        let error = s.delta_loss_error.map_or_else(String::new, |e| format!(" ± {e:.4}"));
        let about = format!("nats a token, {} sequences, {} predictions", s.n_sequences, s.n_predictions);
        rows.push(("delta loss", format!("{:.4}{error}", s.delta_loss), about));
        rows.push(("loss recovered", optional(s.loss_recovered, 4), "against zero-ablation".to_owned()));
        rows.push(("CE clean", format!("{:.4}", s.ce_clean), "untouched model".to_owned()));
        rows.push((
            "CE spliced",
            format!("{:.4}", s.ce_spliced),
            "tap replaced by its reconstruction".to_owned(),
        ));
        rows.push(("CE zero", format!("{:.4}", s.ce_zero), "tap replaced by zero".to_owned()));
    }
    let mut out = format!("# {} {} ({} latents)\n\n", report.model, report.tap, report.n_latents);
    out.push_str("| metric | value | of |\n|---|---:|---|\n");
    for (metric, value, about) in rows {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "| {metric} | {value} | {about} |");
    }
    out.push_str("\n![Firing densities](density.svg)\n");
    out
}

pub(super) fn optional(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |v| format!("{v:.digits$}"))
}

pub(super) fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}
