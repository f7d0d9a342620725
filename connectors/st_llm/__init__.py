"""ST-LLM's parts before the LLM (Liu et al. 2024, arXiv 2404.00308)."""
