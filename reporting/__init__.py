"""What a run leaves behind: files, pictures, curves, W&B, the tuning cache, and the summary of a sweep."""
