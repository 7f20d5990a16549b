//! A batch on a device, there once for all that learn from it.

use std::sync::Arc;

use anyhow::{Result, ensure};
use shared::Rows;

use super::device::{Argument, Buffer, Device};
use super::kernels::{Kernel, Shape};
use super::step::Address;

/// Normalised rows and their targets.
#[derive(Debug)]
pub struct Resident {
    device: Arc<dyn Device + Send + Sync>,
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
        ensure!(y.n_rows() == x.n_rows(), "a training step needs as many targets as rows");
        let same = std::ptr::eq(x.data(), y.data());
        let batch = Self::new(device, x.n_rows(), [x.width(), y.width()], !same)?;
        batch.x.write(x.data())?;
        if let Some(targets) = &batch.y {
            targets.write(y.data())?;
        }
        Ok(Arc::new(batch))
    }

    /// Room for `n_rows` rows, of undefined content, and for targets where rows have others than themselves.
    ///
    /// # Errors
    /// If there are no rows, or the device has too little room.
    pub fn new(
        device: &Arc<dyn Device + Send + Sync>,
        n_rows: usize,
        widths: [usize; 2],
        targets: bool,
    ) -> Result<Self> {
        ensure!(n_rows > 0 && n_rows < 1 << 30, "a training step needs at least one row, not {n_rows}");
        let room = |width: usize| Buffer::new::<f32>(device, n_rows * width);
        let y = if targets { Some(room(widths[1])?) } else { None };
        Ok(Self { device: Arc::clone(device), n_rows, widths, x: room(widths[0])?, y })
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

    /// Whether rows have targets other than themselves.
    #[must_use]
    pub fn has_targets(&self) -> bool {
        self.y.is_some()
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

    /// The targets, back on the host.
    ///
    /// # Errors
    /// If the device fails.
    pub fn targets(&self) -> Result<Vec<f32>> {
        self.y.as_ref().map_or_else(|| self.rows(), |y| y.read(self.n_rows * self.widths[1]))
    }

    /// The sum of every target and that of its squares, with the host's own bits.
    ///
    /// # Errors
    /// If the device fails.
    pub fn moments(&self) -> Result<Vec<[f64; 2]>> {
        let [d_in, d_out] = self.widths;
        let (shape, found) = (Shape::new(d_in, d_out), Buffer::new::<[f64; 2]>(&self.device, self.n_rows)?);
        let [n_rows, width] = [self.n_rows, d_out].map(|n| Argument::U32(n as u32));
        let arguments = [Argument::Address(self.y()), Argument::Address(found.at()), n_rows, width];
        self.device.launch(Kernel::RowMoments, shape, shape.blocks(self.n_rows), &arguments)?;
        found.read(self.n_rows)
    }
}
