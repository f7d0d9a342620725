"""Checkpoints of transformers' vision-language models as ours, and back: one file per family."""
