"""GEM on vLLM: one LLM that embeds and chats, trained and served as one model."""
