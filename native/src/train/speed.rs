//! Where the time of a run goes: what the log and its live line say of speed and memory.

use std::fs;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use shared::config::train::EncoderPrecision;

use super::log::Line;
use super::sieve::has_bf16;
use crate::cpu::simd::{Format, Kernel};

/// Where the time since the line before went; none of it is part of what resuming reproduces.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Speed {
    /// Seconds to the end of the run at this speed.
    pub eta_s: f64,
    /// Share of the time spent in steps of this autoencoder.
    pub training: f64,
    /// 10⁹ floating-point operations a second of the encoder products, with what is kept of them.
    pub encoder_gflops: f64,
    /// The same over the peak of the processor at this precision; none where that is not known.
    pub encoder_share: Option<f64>,
    /// Floating-point operations that a step's mathematics needs, sparse where it is sparse, over time in steps and peak.
    pub mfu: Option<f64>,
    /// Memory of the process, in MiB, where the system says.
    pub resident_mib: Option<f64>,
}

impl Line {
    /// What people see of it; `maker` is what the data waits for.
    pub(super) fn message(&self, maker: &str) -> String {
        let percent = |share: f64| format!("{:.0} %", 100.0 * share);
        let speed = &self.speed;
        let mut message = format!(
            "L0 {:.1} · FVU {:.3} · dead {:.1} % · SAE {} {maker} {} · {:.0} GFLOP/s",
            self.l0,
            self.fvu,
            100.0 * self.dead,
            percent(speed.training),
            percent(self.waiting),
            speed.encoder_gflops
        );
        if let Some(mfu) = speed.mfu {
            message += &format!(" · MFU {}", percent(mfu));
        }
        if let Some(mib) = speed.resident_mib {
            message += &format!(" · {mib:.0} MiB");
        }
        message
    }
}

/// Floating-point operations a second this processor can do in registers, at the precision an encoder product has; measured
/// once, in some milliseconds.
pub(super) fn peak(precision: EncoderPrecision) -> Option<f64> {
    static PEAKS: [OnceLock<Option<f64>>; 2] = [const { OnceLock::new() }; 2];
    let bf16 = precision == EncoderPrecision::Bf16 && has_bf16();
    let (place, format) = if bf16 { (&PEAKS[1], Format::Bf16) } else { (&PEAKS[0], Format::F32) };
    // Not measured inside the lock: the measurement runs on all threads of the pool, and one of them may be waiting for it.
    *place.get().unwrap_or_else(|| {
        let found = Kernel::find(format).and_then(Kernel::peak);
        place.get_or_init(|| found)
    })
}

/// The entry `key` of `/proc/self/status`, in MiB; `None` where the system has no such thing.
pub(crate) fn memory_mib(key: &str) -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_live_line_fits_a_terminal() {
        let speed = Speed {
            eta_s: 100.0,
            training: 0.914,
            encoder_gflops: 1043.2,
            encoder_share: Some(0.5),
            mfu: Some(0.351),
            resident_mib: Some(15_360.2),
        };
        let line = Line {
            step: 1,
            tokens: 8,
            loss: 0.5,
            mse: 0.25,
            l0: 140.06,
            fvu: 0.2371,
            dead: 0.125,
            lambda: 0.0,
            lr: 1e-3,
            skipped: 0,
            tokens_per_s: 1.0,
            waiting: 0.08,
            speed,
        };
        let message = line.message("LM");
        assert_eq!(
            message,
            "L0 140.1 · FVU 0.237 · dead 12.5 % · SAE 91 % LM 8 % · 1043 GFLOP/s · MFU 35 % · 15360 MiB"
        );
        // The bar before it, with counts, rate and time left, takes about 70 columns.
        assert!(message.chars().count() <= 90);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_and_peak_are_measured_once() {
        let (now, most) = (memory_mib("VmRSS:").unwrap(), memory_mib("VmHWM:").unwrap());
        assert!(now > 1.0 && now < most + 64.0 && memory_mib("nothing:").is_none());
        let found = peak(EncoderPrecision::F32);
        assert_eq!(found, peak(EncoderPrecision::F32));
        assert!(found.is_none_or(|peak| peak > 1e9));
        assert!(!has_bf16() || peak(EncoderPrecision::Bf16).is_some());
    }
}
