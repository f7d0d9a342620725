"""Recipes: how they are written, inherited, overridden and parsed into typed sections."""
