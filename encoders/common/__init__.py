"""What encoders of several families share."""
