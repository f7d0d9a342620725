"""Formats of training data: one file a format, each turning a record into the one conversation type."""
