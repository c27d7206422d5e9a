"""Judges where people and trainers already are: a reward service, and a page in the browser."""
