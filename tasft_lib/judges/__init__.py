"""Who says "harmful": one protocol, one file per kind of judge."""
