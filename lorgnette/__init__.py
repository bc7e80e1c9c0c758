"""lorgnette: compiles small vision-language models for edge and mobile devices."""

from __future__ import annotations

__version__ = "0.1.0"
