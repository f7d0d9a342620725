"""Towers that look at several frames together."""
