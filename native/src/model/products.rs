//! The transformer's matrix products and attention on this machine's vector units, in the precision asked for.

use shared::Precision;
use shared::lm::{Heads, LmError, Packed, Products, QueryKeyValue};

use crate::cpu::attention;
use crate::cpu::packed::PackedMatrix;
use crate::cpu::simd::{Format, Kernel};
use crate::cpu::widened::WidenedMatrix;

/// Products in one precision: by the kernels of [`crate::cpu`] where the processor has the instructions, else f32 by candle
/// and other formats widened to f32.
#[derive(Debug, Clone, Copy)]
pub(super) struct CpuProducts {
    format: Format,
    kernel: Option<Kernel>,
    f32_kernel: Option<Kernel>,
}

impl CpuProducts {
    pub(super) fn new(precision: Precision) -> Self {
        let format = match precision {
            Precision::F32 => Format::F32,
            Precision::Bf16 => Format::Bf16,
            Precision::Q8_0 => Format::Q8,
        };
        Self { format, kernel: Kernel::find(format), f32_kernel: Kernel::find(Format::F32) }
    }
}

impl Products for CpuProducts {
    fn pack(&self, weight: &[f32], n_out: usize, n_in: usize) -> Result<Option<Box<dyn Packed>>, LmError> {
        Ok(match self.kernel {
            Some(kernel) => Some(Box::new(PackedMatrix::new(kernel, weight, n_out, n_in)?)),
            None if self.format == Format::F32 => None,
            None => Some(Box::new(WidenedMatrix::new(self.format, weight, n_out, n_in)?)),
        })
    }

    fn attend(
        &self,
        heads: &Heads,
        seq: usize,
        inputs: QueryKeyValue<'_>,
        out: &mut [f32],
    ) -> Result<bool, LmError> {
        let Some(kernel) = self.f32_kernel else { return Ok(false) };
        attention::attend(kernel, heads, seq, inputs, out)?;
        Ok(true)
    }
}

impl Packed for PackedMatrix {
    fn n_out(&self) -> usize {
        self.n_out()
    }

    fn n_in(&self) -> usize {
        self.n_in()
    }

    fn row(&self, i: usize, row: &mut [f32]) {
        self.row(i, row);
    }

    fn product(&self, x: &[f32], out: &mut [f32], add: bool) -> Result<(), LmError> {
        Ok(self.product(x, out, add)?)
    }
}

impl Packed for WidenedMatrix {
    fn n_out(&self) -> usize {
        self.n_out()
    }

    fn n_in(&self) -> usize {
        self.n_in()
    }

    fn row(&self, i: usize, row: &mut [f32]) {
        self.row(i, row);
    }

    fn product(&self, x: &[f32], out: &mut [f32], add: bool) -> Result<(), LmError> {
        Ok(self.product(x, out, add)?)
    }
}
