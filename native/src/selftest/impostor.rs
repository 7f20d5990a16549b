//! Devices with one mistake each: a judge that lets one of them pass is no judge.

use std::sync::Arc;

use anyhow::Result;

use crate::cuda::{Address, Argument, Device, Kernel, Product, Shape, Step};

/// A mistake, and the case by which it must be found out.
#[derive(Debug, Clone, Copy)]
pub struct Mistake {
    /// What is wrong.
    pub name: &'static str,
    /// The case that shows it.
    pub case: &'static str,
    /// What a kernel is told instead.
    change: fn(Kernel, &mut Step),
}

/// Every mistake.
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

/// A device whose kernels are told something wrong.
#[derive(Debug)]
pub struct Impostor {
    device: Arc<dyn Device + Send + Sync>,
    mistake: Mistake,
}

impl Impostor {
    /// `device` with this mistake.
    #[must_use]
    pub fn new(device: Arc<dyn Device + Send + Sync>, mistake: Mistake) -> Self {
        Self { device, mistake }
    }
}

impl Device for Impostor {
    fn name(&self) -> String {
        format!("{}, {}", self.device.name(), self.mistake.name)
    }

    fn memory(&self) -> Result<(u64, u64)> {
        self.device.memory()
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.device.allocate(bytes)
    }

    fn release(&self, at: Address) {
        self.device.release(at);
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()> {
        self.device.upload(to, bytes)
    }

    fn download(&self, from: Address, into: &mut [u8]) -> Result<()> {
        self.device.download(from, into)
    }

    fn fill(&self, at: Address, byte: u8, bytes: usize) -> Result<()> {
        self.device.fill(at, byte, bytes)
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.device.copy(to, from, bytes)
    }

    fn launch(&self, kernel: Kernel, shape: Shape, blocks: usize, arguments: &[Argument<'_>]) -> Result<()> {
        let mut arguments = arguments.to_vec();
        let mut told = Step::default();
        if let Some(Argument::Bytes(bytes)) = arguments.first_mut() {
            bytemuck::bytes_of_mut(&mut told).copy_from_slice(bytes);
            (self.mistake.change)(kernel, &mut told);
            *bytes = bytemuck::bytes_of(&told);
        }
        self.device.launch(kernel, shape, blocks, &arguments)
    }

    fn product(&self, product: &Product) -> Result<()> {
        self.device.product(product)
    }

    fn wait(&self) -> Result<()> {
        self.device.wait()
    }
}
