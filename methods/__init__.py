"""Editing methods: one file each, written to be read beside its paper. `base` holds what they share."""
