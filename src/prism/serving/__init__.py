"""Judges where people and trainers already are: a reward service."""
