"""Decoders behind one small interface; one module per decoder, found by name in the registry (kind ``backend``)."""
