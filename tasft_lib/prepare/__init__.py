"""Rows before training: harvested, checked, made."""
