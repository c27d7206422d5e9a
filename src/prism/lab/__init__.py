"""The laboratory: what is compared and claimed. The core imports nothing of it."""
