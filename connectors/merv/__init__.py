"""MERV (Chung et al. 2025): projectors to a common grid, and cross-attentive fusion."""
