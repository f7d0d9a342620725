"""What a stage optimises: one small module per objective."""
