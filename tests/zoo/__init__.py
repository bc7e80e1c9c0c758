"""The zoo: small checkpoints in published layouts, trained here on procedural pictures."""
