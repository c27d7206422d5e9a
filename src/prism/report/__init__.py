"""The results of a run: metrics.json, terminal tables and one self-contained page."""
