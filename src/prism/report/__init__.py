"""What a run leaves behind: metrics.json, terminal tables and one self-contained page."""
