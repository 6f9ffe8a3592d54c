"""Parse, then one call: a file a verb."""
