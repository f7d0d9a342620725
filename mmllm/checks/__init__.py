"""Checks of a part or a whole recipe, and the summary of its figures."""
