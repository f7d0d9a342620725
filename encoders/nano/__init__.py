"""Small encoders that learn NanoWorld from nothing."""
