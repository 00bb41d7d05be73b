"""What a GEM model is worth: how well it embeds (mteb), and what it is as an LLM (lm-eval)."""
