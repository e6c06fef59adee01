"""Files and folders that stay whole: written, locked, checked, found again."""
