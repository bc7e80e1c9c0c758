"""Checkpoint to components: reading, re-authored modules, tracing and the parity ladder."""
