"""PPLLaVA (Liu et al. 2024): relevance of patches to the prompt, and pooling by it."""
