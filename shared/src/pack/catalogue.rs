//! `packs/index.json`: the packs of a site.

use serde::{Deserialize, Serialize};

use super::error::{PackError, check};
use super::manifest::Manifest;
use super::{CATALOGUE, VERSION, is_safe_path};
use crate::tap::Site;

/// The packs of a site, in the order to show them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogue {
    /// Always [`VERSION`].
    pub version: u32,
    /// One entry a pack.
    pub packs: Vec<PackEntry>,
}

/// What an overview needs of a pack before its manifest is loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackEntry {
    /// Folder of the pack inside `packs/`.
    pub path: String,
    /// The manifest's `name`.
    pub name: String,
    /// The manifest's `title`.
    pub title: String,
    /// The manifest's `sae.site`.
    pub site: Site,
    /// The manifest's `sae.layer`.
    pub layer: usize,
    /// Number of layers of a multi-layer autoencoder; absent for others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    /// The manifest's `sae.n_latents`.
    pub n_latents: usize,
    /// The manifest's `model.name`.
    pub model: String,
}

impl PackEntry {
    /// The entry of a pack that lies under its own name.
    #[must_use]
    pub fn of(manifest: &Manifest) -> Self {
        Self {
            path: manifest.name.clone(),
            name: manifest.name.clone(),
            title: manifest.title.clone(),
            site: manifest.sae.site,
            layer: manifest.sae.layer,
            layers: manifest.flow.as_ref().map(|flow| flow.layers.len()),
            n_latents: manifest.sae.n_latents,
            model: manifest.model.name.clone(),
        }
    }
}

impl Catalogue {
    /// A catalogue of these packs.
    #[must_use]
    pub fn new(packs: Vec<PackEntry>) -> Self {
        Self { version: VERSION, packs }
    }

    /// Reads `packs/index.json`.
    ///
    /// # Errors
    /// If it is not the JSON of this version, a path leaves `packs/`, or a name repeats.
    pub fn read(bytes: &[u8]) -> Result<Self, PackError> {
        let catalogue: Self = super::from_json(CATALOGUE, bytes)?;
        catalogue.validate()?;
        Ok(catalogue)
    }

    /// The bytes of `packs/index.json`.
    ///
    /// # Errors
    /// As [`Catalogue::read`].
    pub fn write(&self) -> Result<Vec<u8>, PackError> {
        self.validate()?;
        super::to_json(CATALOGUE, self, true)
    }

    fn validate(&self) -> Result<(), PackError> {
        check(self.version == VERSION, CATALOGUE, "version", VERSION.to_string(), self.version)?;
        for (i, pack) in self.packs.iter().enumerate() {
            check(is_safe_path(&pack.path), CATALOGUE, "path", "a plain relative path", &pack.path)?;
            let fresh = self.packs[..i].iter().all(|other| other.name != pack.name);
            check(fresh, CATALOGUE, "name", "names that differ", &pack.name)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::manifest::tests::manifest;

    #[test]
    fn round_trip_and_rules() {
        let entry = PackEntry::of(&manifest());
        let catalogue = Catalogue::new(vec![entry.clone()]);
        assert_eq!(Catalogue::read(&catalogue.write().unwrap()).unwrap(), catalogue);
        assert!(Catalogue::new(vec![entry.clone(), entry.clone()]).write().is_err(), "repeated name");
        assert!(Catalogue::new(vec![PackEntry { path: "../x".to_owned(), ..entry }]).write().is_err());
        assert!(Catalogue { version: 2, packs: vec![] }.write().is_err());
    }
}
