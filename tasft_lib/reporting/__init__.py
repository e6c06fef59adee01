"""Figures, tables, the paper's numbers, verdicts and the report; only this draws."""
