"""Recipes: how they are written, inherited, overridden and read into typed sections."""
