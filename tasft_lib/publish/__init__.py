"""A trained model for others: card, merged export, hub."""
