"""What teacher and trainer share: records, errors and the codec. Knows no model, no engine, no loss."""
