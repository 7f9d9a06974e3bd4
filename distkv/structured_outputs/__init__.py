"""Answers that keep to a schema, an expression or a grammar."""
