"""Rewards of answers: by an image-text model, or by a rule."""
