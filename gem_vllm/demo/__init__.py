"""``gem-vllm demo``: from an LLM to one engine that embeds and chats, in minutes."""
