//! Training sparse autoencoders: schedules, optimiser, the step, checkpoints, the loop.
