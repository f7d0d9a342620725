"""Formats of training data: one file per format, each turning a record into the one conversation type."""
