//! Which backend encodes, and the reason that is shown for it.

/// The backend asked for in the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wish {
    /// Whatever is best here.
    #[default]
    Auto,
    /// The CPU, in WebAssembly.
    Cpu,
    /// WebGPU, even on an adapter that is a program itself.
    Gpu,
}

impl Wish {
    /// Reads the value of `backend=`; unknown values mean [`Wish::Auto`].
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text {
            "cpu" => Self::Cpu,
            "gpu" => Self::Gpu,
            _ => Self::Auto,
        }
    }

    /// The value in an address; `None` for the default.
    #[must_use]
    pub fn key(self) -> Option<&'static str> {
        match self {
            Self::Auto => None,
            Self::Cpu => Some("cpu"),
            Self::Gpu => Some("gpu"),
        }
    }
}

/// What looking for an adapter found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// An adapter by this name; `software` when it is itself a program on the CPU.
    Adapter {
        /// Its name.
        name: String,
        /// Whether it computes on the CPU.
        software: bool,
    },
    /// None, for this reason.
    None(String),
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A graphics device.
    Gpu,
    /// WebAssembly on the CPU.
    Cpu,
}

/// A backend and why it was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// What computes.
    pub kind: Kind,
    /// Why, as a sentence.
    pub reason: String,
}

impl Choice {
    /// Decides, given what was asked for and what was found.
    #[must_use]
    pub fn make(wish: Wish, probe: &Probe) -> Self {
        let (kind, reason) = match (wish, probe) {
            (Wish::Cpu, _) => (Kind::Cpu, "Asked for in the address (backend=cpu).".to_owned()),
            (_, Probe::None(reason)) => (Kind::Cpu, format!("No WebGPU here: {reason}.")),
            (Wish::Gpu, Probe::Adapter { name, .. }) => {
                (Kind::Gpu, format!("Adapter {name}, asked for in the address (backend=gpu)."))
            }
            (Wish::Auto, Probe::Adapter { name, software: true }) => (
                Kind::Cpu,
                format!("The only WebGPU adapter, {name}, is software; the CPU is faster directly."),
            ),
            (Wish::Auto, Probe::Adapter { name, software: false }) => (Kind::Gpu, format!("Adapter {name}.")),
        };
        Self { kind, reason }
    }

    /// The CPU, after the graphics device failed for `reason`.
    #[must_use]
    pub fn after_failure(reason: &str) -> Self {
        Self { kind: Kind::Cpu, reason: format!("WebGPU failed, so the CPU took over: {reason}.") }
    }

    /// The short name on the page.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self.kind {
            Kind::Gpu => "WebGPU",
            Kind::Cpu => "CPU (WebAssembly)",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn software_adapters_are_used_only_when_asked_for() {
        let software = Probe::Adapter { name: "SwiftShader".to_owned(), software: true };
        let card = Probe::Adapter { name: "Card".to_owned(), software: false };
        let none = Probe::None("nothing".to_owned());
        for (wish, probe, kind) in [
            (Wish::Auto, &software, Kind::Cpu),
            (Wish::Gpu, &software, Kind::Gpu),
            (Wish::Auto, &card, Kind::Gpu),
            (Wish::Cpu, &card, Kind::Cpu),
            (Wish::Auto, &none, Kind::Cpu),
            (Wish::Gpu, &none, Kind::Cpu),
        ] {
            let choice = Choice::make(wish, probe);
            assert_eq!(choice.kind, kind, "{wish:?} {probe:?}");
            assert!(choice.reason.ends_with('.'));
        }
        assert!(Choice::make(Wish::Auto, &software).reason.contains("SwiftShader"));
    }
}
