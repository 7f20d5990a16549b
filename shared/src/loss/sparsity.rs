//! The sparsity term of the objective, and what the trained threshold parameter of a JumpReLU means.

/// What the trained threshold parameter means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Parametrisation {
    /// The parameter is `log θ`, so θ stays positive.
    Log,
    /// The parameter is θ.
    Raw,
}

impl Parametrisation {
    /// θ of a parameter value.
    #[must_use]
    pub fn threshold(self, parameter: f64) -> f64 {
        match self {
            Self::Log => parameter.exp(),
            Self::Raw => parameter,
        }
    }

    /// The parameter value of a θ (for [`Parametrisation::Log`], θ > 0).
    #[must_use]
    pub fn parameter(self, threshold: f64) -> f64 {
        match self {
            Self::Log => threshold.ln(),
            Self::Raw => threshold,
        }
    }

    /// dθ/dparameter at a θ.
    #[must_use]
    pub fn derivative(self, threshold: f64) -> f64 {
        match self {
            Self::Log => threshold,
            Self::Raw => 1.0,
        }
    }
}

/// The sparsity term of the objective. `v` are the latents it counts: the activations, or with a gate `ReLU(π_gate)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sparsity {
    /// None: the activation function itself limits how many latents are active.
    None,
    /// `λ L̄0` (arXiv 2407.14435 eq. 9).
    L0 {
        /// λ.
        lambda: f64,
    },
    /// `λ (L̄0/L0* − 1)²` on the batch mean (arXiv 2407.14435, appendix).
    TargetL0 {
        /// λ, the weight of the square.
        lambda: f64,
        /// L0*.
        target: f64,
    },
    /// `λ mean_n Σ_i v_i^p ω_i`: L1 for p = 1, annealed to a smaller p (arXiv 2408.00113 §4).
    Norm {
        /// λ.
        lambda: f64,
        /// p, in (0, 1].
        p: f64,
        /// Whether ω_i = ‖d_i‖ and directions have any length, instead of ω_i = 1 and unit directions.
        decoder_norm: bool,
    },
}

impl Sparsity {
    /// The part of the term that depends on the mean L0 alone.
    #[must_use]
    pub fn of_l0(&self, mean_l0: f64) -> f64 {
        match *self {
            Self::None | Self::Norm { .. } => 0.0,
            Self::L0 { lambda } => lambda * mean_l0,
            Self::TargetL0 { lambda, target } => lambda * (mean_l0 / target - 1.0).powi(2),
        }
    }

    /// The derivative of [`Sparsity::of_l0`]: the λ that a fixed L0 term would need to pull equally at this L0.
    #[must_use]
    pub fn effective_lambda(&self, mean_l0: f64) -> f64 {
        match *self {
            Self::None | Self::Norm { .. } => 0.0,
            Self::L0 { lambda } => lambda,
            Self::TargetL0 { lambda, target } => 2.0 * lambda * (mean_l0 / target - 1.0) / target,
        }
    }

    /// The term of one value `v > 0` of a latent whose direction has length `norm`, before the mean over rows.
    #[must_use]
    pub fn of_value(&self, v: f64, norm: f64) -> f64 {
        match *self {
            Self::Norm { lambda, p, decoder_norm } => {
                lambda * v.powf(p) * if decoder_norm { norm } else { 1.0 }
            }
            _ => 0.0,
        }
    }

    /// Derivative of [`Sparsity::of_value`] in `v`; at v = 0, where it would be infinite for p < 1, it is not asked for.
    #[must_use]
    pub fn value_derivative(&self, v: f64, norm: f64) -> f64 {
        match *self {
            Self::Norm { p, .. } => p * self.of_value(v, norm) / v,
            _ => 0.0,
        }
    }

    /// Whether directions keep length 1.
    #[must_use]
    pub fn unit_directions(&self) -> bool {
        !matches!(self, Self::Norm { decoder_norm: true, .. })
    }
}
