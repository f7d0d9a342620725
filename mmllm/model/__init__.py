"""The model: encoder bank, connector graph, a causal LM, and how all of it is built and loaded."""
