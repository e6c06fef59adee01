"""Who says "harmful": one protocol, one file per kind of judge."""

from .refusals import is_refusal

__all__ = ["is_refusal"]
