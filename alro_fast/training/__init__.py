"""Training runs: parsing, the Trainer, stages, checkpoints."""
