"""Serving at scale: GEM checkpoints behind Ray."""
