"""Makes `python -m lorgnette` the command line."""

from __future__ import annotations

from lorgnette.cli.main import main

if __name__ == "__main__":
    main()
