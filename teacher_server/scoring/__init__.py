"""Sessions and what is said of their rows. Knows no transport and no model."""
