"""The way of one record: read, templated, checked, drawn."""
