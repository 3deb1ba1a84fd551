"""What keeps a run from losing work: whole checkpoints, signals, steps that are no number, a lack of memory or disk."""
