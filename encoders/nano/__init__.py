"""Small encoders that learn NanoWorld from scratch."""
