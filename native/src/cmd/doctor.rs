//! `stratascope doctor`.

use std::io::Write;

use anyhow::Result;

use crate::doctor::{self, Findings};

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let findings = doctor::examine();
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &findings)?;
        writeln!(out)?;
    } else {
        out.write_all(text(&findings).as_bytes())?;
    }
    Ok(())
}

fn text(findings: &Findings) -> String {
    let cpu = &findings.cpu;
    let with = |wanted| -> String {
        let names: Vec<&str> = cpu.features.iter().filter(|f| f.1 == wanted).map(|f| f.0).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(" ") }
    };
    let mut lines = vec![
        format!("stratascope {}", findings.version),
        format!("processor     {}, {} threads", cpu.model, cpu.threads),
        format!("              has {}; lacks {}", with(true), with(false)),
        format!(
            "memory        {} of {} available",
            gib(findings.memory_available),
            gib(findings.memory_total)
        ),
    ];
    if let Some(disk) = &findings.disk {
        lines.push(format!(
            "disk          {} of {} free on {}",
            gib(disk.free),
            gib(disk.total),
            disk.mount.display()
        ));
    }
    let gpu = &findings.gpu;
    let devices = if gpu.devices.is_empty() { "an NVIDIA GPU".to_owned() } else { gpu.devices.join(", ") };
    lines.push(format!("GPU           {}", if gpu.usable { devices } else { "none usable".to_owned() }));
    lines.extend(gpu.notes.iter().map(|note| format!("              {note}")));
    lines.push(format!(
        "CUDA          {}",
        if findings.cuda.cards.is_empty() { "no card" } else { "for training and self-tests" }
    ));
    lines.extend(findings.cuda.lines().into_iter().map(|line| format!("              {line}")));
    for tool in &findings.tools {
        let found = match (&tool.path, &tool.version) {
            (Some(path), version) => {
                format!("{} ({})", version.as_deref().unwrap_or("version unknown"), path.display())
            }
            (None, _) => format!("not found ({})", tool.purpose),
        };
        lines.push(format!("{:<14}{found}", tool.name));
    }
    lines.join("\n") + "\n"
}

fn gib(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown to one decimal")]
    let gib = bytes as f64 / f64::from(1 << 30);
    format!("{gib:.1} GiB")
}
