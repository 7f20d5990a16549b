//! Does this machine compute right? The conformance suite, run on the backends of this page.

use std::sync::Arc;

use conformance::suite::{self, Report};
use leptos::prelude::*;
use leptos::task::spawn_local;
use shared::cpu::ScalarBackend;

use crate::backend;
use crate::gpu::{Blocks, GpuBackend, GpuError};
use crate::state::figures;

/// A backend and what the suite found.
#[derive(Clone)]
struct Verdict {
    backend: &'static str,
    name: String,
    report: Result<Arc<Report>, String>,
    ms: f64,
}

impl Verdict {
    fn word(&self) -> &'static str {
        match &self.report {
            Ok(report) if report.passed() => "passed",
            Ok(_) => "failed",
            Err(_) => "absent",
        }
    }
}

async fn on_cpu() -> Verdict {
    let started = backend::now();
    let report = suite::run(async |sae| Ok::<_, std::convert::Infallible>(ScalarBackend::new(sae))).await;
    let ms = backend::now() - started;
    Verdict { backend: "cpu", name: "CPU (WebAssembly)".to_owned(), report: Ok(Arc::new(report)), ms }
}

async fn on_gpu() -> Verdict {
    let started = backend::now();
    let (name, report) = match backend::device().await {
        Err(GpuError::NoAdapter(_)) => ("WebGPU".to_owned(), Err("the browser offers no adapter".to_owned())),
        Err(error) => ("WebGPU".to_owned(), Err(error.to_string())),
        Ok(gpu) => {
            let name = format!("WebGPU, {}", gpu.name());
            let report =
                suite::run(async |sae| GpuBackend::new(gpu.clone(), Arc::new(sae), Blocks::default()).await);
            (name, Ok(Arc::new(report.await)))
        }
    };
    Verdict { backend: "gpu", name, report, ms: backend::now() - started }
}

/// The page.
#[component]
pub(super) fn SelfTest() -> impl IntoView {
    let verdicts = RwSignal::new(Vec::<Verdict>::new());
    let done = RwSignal::new(false);
    spawn_local(async move {
        let cpu = on_cpu().await;
        verdicts.try_update(|v| v.push(cpu));
        let gpu = on_gpu().await;
        verdicts.try_update(|v| v.push(gpu));
        done.try_set(true);
    });
    view! {
        <h1>"Does this machine compute right?"</h1>
        <p class="lead">
            "The suite that every backend of Stratascope must pass, run here in the page: values of independent programs, and dictionaries whose latents lie within a rounding error of their thresholds. Each backend must find exactly the active latents of the double-precision reference."
        </p>
        <div data-selftest=move || if done.get() { "done" } else { "running" }>
            {move || verdicts.get().into_iter().map(|v| view! { <Outcome verdict=v /> }).collect_view()}
            <Show when=move || !done.get()><p class="loading" role="status">"Running…"</p></Show>
        </div>
    }
}

#[component]
fn Outcome(verdict: Verdict) -> impl IntoView {
    let word = verdict.word();
    let Verdict { backend, name, report, ms } = verdict;
    let details = match report {
        Err(reason) => view! { <p>"Not here: "{reason}"."</p> }.into_any(),
        Ok(report) => {
            let rows = report.checks.iter().map(|check| {
                let (found, share) = match &check.outcome {
                    Ok(agreement) => ("right".to_owned(), figures::percent(agreement.share)),
                    Err(reason) => (reason.clone(), "–".to_owned()),
                };
                view! { <tr><th scope="row">{check.name.clone()}</th><td>{found}</td><td class="number">{share}</td></tr> }
            });
            let failed = report.failures().count();
            view! {
                <p>{report.checks.len() - failed}" of "{report.checks.len()}" checks right, in "{figures::milliseconds(ms)}"."</p>
                <details open=failed != 0>
                    <summary>"All checks"</summary>
                    <div class="scroll" tabindex="0" role="region" aria-label=format!("Checks of {name}")>
                        <table class="codes">
                            <thead><tr><th scope="col">"Check"</th><th scope="col">"Found"</th><th scope="col">"Share of the tolerance used"</th></tr></thead>
                            <tbody>{rows.collect_view()}</tbody>
                        </table>
                    </div>
                </details>
            }
            .into_any()
        }
    };
    view! {
        <section class="card verdict" data-backend=backend data-verdict=word>
            <h2>{name.clone()}": "{word}</h2>
            {details}
        </section>
    }
}
