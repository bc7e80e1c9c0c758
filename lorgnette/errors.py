"""The errors a user can meet, each one clear line and an exit code."""

from __future__ import annotations

EXIT_OK = 0
EXIT_CHECK_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130

MAX_PART = 400
"""Characters of one part of an error's line: a damaged file can name things of megabytes."""


class LorgnetteError(Exception):
    """Wrong input, told in one line: what failed, where, got, wanted, what to do.

    Args:
        what: What failed, as a short sentence without a final stop.
        where: The file, key or tensor it was found in.
        got: What was found there.
        wanted: What would have been right.
        hint: What the user can do about it.
    """

    exit_code = EXIT_WRONG_INPUT

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        wanted: object = None,
        hint: str | None = None,
    ) -> None:
        """Joins the parts to one line; every part stays readable as an attribute."""
        self.what = what
        self.where = None if where is None else str(where)
        self.got = None if got is None else str(got)
        self.wanted = None if wanted is None else str(wanted)
        self.hint = hint
        parts = [_brief(what)]
        if where is not None:
            parts.append(f"in {where}")
        line = " ".join(parts)
        if got is not None:
            line += f": got {_brief(got)}"
        if wanted is not None:
            line += f"{',' if got is not None else ':'} wanted {_brief(wanted)}"
        if hint is not None:
            line += f" ({hint})"
        super().__init__(" ".join(line.split()))


def _brief(part: object) -> str:
    text = str(part)
    return text if len(text) <= MAX_PART else f"{text[:MAX_PART]}…"


class CheckpointError(LorgnetteError):
    """A checkpoint is missing a file, damaged, or not of the layout its family publishes."""


class ConfigError(LorgnetteError):
    """A config, template or recipe holds something that is not understood."""


class BundleError(LorgnetteError):
    """A bundle is damaged, hostile, or made for a newer reader."""


class ImageError(LorgnetteError):
    """A picture cannot be read or is outside the supported sizes."""


class RequestError(LorgnetteError):
    """A generation request cannot be served: its arguments or its length are wrong."""


class DatasetError(LorgnetteError):
    """A file of questions, or the answers to it, is damaged or not of its format."""


class ProfileError(LorgnetteError):
    """A profile is damaged, of another version, or could not be measured."""


class MissingExtraError(LorgnetteError):
    """An optional part of the package is not installed."""


class VerifyError(LorgnetteError):
    """A check failed: what was made does not give the answer of the original."""

    exit_code = EXIT_CHECK_FAILED
