"""A model after training: what it is asked, what it answers, rates with intervals."""
