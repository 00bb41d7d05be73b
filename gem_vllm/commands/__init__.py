"""Subcommands of ``gem-vllm``, one module each."""
