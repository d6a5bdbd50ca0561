"""What teacher and trainer share: records, errors, codec. Knows no model, no engine, no loss."""
