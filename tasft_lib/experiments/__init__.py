"""What the notebooks call: from settings to arms, their answers and a record."""
