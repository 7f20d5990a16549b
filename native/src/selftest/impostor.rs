//! Mistakes that a device may make, one each: a judge that lets one of them pass is no judge.

use std::sync::Arc;

use crate::cuda::{Device, Intercept, Kernel, Step};

/// A mistake, and the case by which it must be found out.
#[derive(Debug, Clone, Copy)]
pub struct Mistake {
    /// What is wrong.
    pub name: &'static str,
    /// The case that shows it: of training, or what is in the name of one of the conformance suite.
    pub case: &'static str,
    /// What a kernel is told instead.
    change: fn(Kernel, &mut Step),
}

/// Every mistake of a training step.
pub const MISTAKES: [Mistake; 10] = [
    Mistake {
        name: "the window has one side",
        case: "jumprelu",
        change: |kernel, step| {
            if kernel == Kernel::Thresholds {
                step.bandwidth = 0.0;
            }
        },
    },
    Mistake { name: "no pull on L0", case: "jumprelu", change: |_, step| step.lambda_per_row = step.v_own1 },
    Mistake { name: "log θ taken for θ", case: "raw jumprelu", change: |_, step| step.log_threshold = 1 },
    Mistake { name: "the pre-bias is not felt", case: "topk", change: |_, step| step.pre_bias = 0 },
    Mistake {
        name: "directions keep no length",
        case: "jumprelu",
        change: |_, step| step.unit_directions = 0,
    },
    Mistake { name: "moments are not caught up", case: "jumprelu", change: |_, step| step.beta2 = 1.0 },
    Mistake { name: "no correction of moments", case: "relu", change: |_, step| step.correction = 1.0 },
    Mistake { name: "AuxK weighs double", case: "batchtopk", change: |_, step| step.aux_scale *= 2.0 },
    Mistake { name: "the gate learns nothing", case: "gated", change: |_, step| step.gate_scale = 0.0 },
    Mistake {
        name: "layers share the first threshold",
        case: "jumprelu, thresholds of layers",
        change: |_, step| step.layers = 0,
    },
];

/// Mistakes in encoding with a released autoencoder.
pub const ENCODING: [Mistake; 5] = [
    Mistake { name: "f32 decides near a threshold", case: "jumprelu", change: |_, step| step.norms = 0 },
    Mistake { name: "f32 decides near zero", case: "relu", change: |_, step| step.norms = 0 },
    Mistake {
        name: "margins do not grow with the vector",
        case: "jumprelu",
        change: |_, step| step.margin_scale = step.margin_offset,
    },
    Mistake {
        name: "no encoder bias",
        case: "relu",
        // The margins are next to nothing.
        change: |_, step| step.b_enc = step.margin_offset,
    },
    Mistake {
        name: "fewer than k are kept",
        case: "top-k",
        change: |kernel, step| {
            if kernel == Kernel::KeepLargest {
                step.largest = step.largest.min(4);
            }
        },
    },
];

impl Mistake {
    /// `device`, making it.
    #[must_use]
    pub fn made_by(self, device: Arc<dyn Device + Send + Sync>) -> Intercept {
        Intercept::new(device, self.name, self.change)
    }
}
