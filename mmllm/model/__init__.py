"""The model: bank of encoders, graph of connectors, a causal LM, and how all of it is built and loaded."""
