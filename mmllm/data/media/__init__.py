"""Media files: reading them in a separate process, sampling, resizing, caching."""
