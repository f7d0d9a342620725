"""What a stage optimises: one small module an objective."""
