"""Training of GEM checkpoints."""
