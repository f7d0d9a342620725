"""Media files: reading them in a process of their own, sampling, resizing, keeping."""
