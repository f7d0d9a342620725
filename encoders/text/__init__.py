"""Text towers as sources of prompt features."""
