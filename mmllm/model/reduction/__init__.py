"""Running an LLM on fewer visual tokens, in our models and in those of transformers."""
