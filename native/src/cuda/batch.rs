//! A batch on a device, uploaded once for all that learn from it.

use std::sync::Arc;

use anyhow::{Result, ensure};
use shared::Rows;

use super::device::{Buffer, Device};
use super::step::Address;

/// Normalised rows and their targets.
#[derive(Debug)]
pub struct Resident {
    n_rows: usize,
    widths: [usize; 2],
    x: Buffer,
    /// None where rows are their own targets.
    y: Option<Buffer>,
}

impl Resident {
    /// Uploads `x [N, d_in]` and `y [N, d_out]`; the same values only once.
    ///
    /// # Errors
    /// If there are no rows, or not as many targets, or the device has too little room.
    pub fn of(device: &Arc<dyn Device + Send + Sync>, x: Rows<'_>, y: Rows<'_>) -> Result<Arc<Self>> {
        let n_rows = x.n_rows();
        ensure!(
            n_rows > 0 && n_rows < 1 << 30 && y.n_rows() == n_rows,
            "a training step needs as many targets as rows, and at least one"
        );
        let same = std::ptr::eq(x.data(), y.data());
        let targets = if same { None } else { Some(Buffer::of(device, y.data())?) };
        let widths = [x.width(), y.width()];
        Ok(Arc::new(Self { n_rows, widths, x: Buffer::of(device, x.data())?, y: targets }))
    }

    /// Rows.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Widths of rows and targets.
    #[must_use]
    pub fn widths(&self) -> [usize; 2] {
        self.widths
    }

    /// Where the rows are.
    #[must_use]
    pub fn x(&self) -> Address {
        self.x.at()
    }

    /// Where the targets are.
    #[must_use]
    pub fn y(&self) -> Address {
        self.y.as_ref().map_or(self.x.at(), Buffer::at)
    }

    /// The rows, back on the host.
    ///
    /// # Errors
    /// If the device fails.
    pub fn rows(&self) -> Result<Vec<f32>> {
        self.x.read(self.n_rows * self.widths[0])
    }
}
