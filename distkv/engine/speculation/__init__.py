"""Tokens that are drafted and checked several in a step."""
