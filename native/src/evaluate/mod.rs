//! Measuring a trained autoencoder on held-out activations and spliced into its language model.
