"""What a bundle costs on this machine, phase by phase; see `docs/profile.md`."""
