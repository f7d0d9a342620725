"""Parts of no single paper: projectors, pooling, separators, windows."""
