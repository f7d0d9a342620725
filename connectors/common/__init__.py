"""Parts that belong to no single paper: projectors, pooling, separators, windows."""
