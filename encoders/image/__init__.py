"""Image towers, applied frame by frame."""
