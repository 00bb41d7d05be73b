"""GEM on vLLM: one LLM that embeds and chats, trained and served as one model."""

from importlib.metadata import version

__version__ = version("gem-vllm")
