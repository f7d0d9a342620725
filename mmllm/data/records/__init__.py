"""Training data: formats, mixtures, conversations, alignment levels."""
