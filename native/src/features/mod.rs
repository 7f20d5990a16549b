//! What each latent responds to, collected into a pack.
