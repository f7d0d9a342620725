"""LLaVA-ST's parts before the LLM (Li et al. 2025, arXiv 2501.08282)."""
