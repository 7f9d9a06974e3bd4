"""Answers with drafts beside the same ones without."""
