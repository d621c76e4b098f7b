"""Edits measured, written down as rows, and shown: metrics, the runner, reports, W&B."""
