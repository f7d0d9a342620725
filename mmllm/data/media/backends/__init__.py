"""Decoders behind one small interface; one module a decoder, found by name in the registry (kind ``backend``)."""
