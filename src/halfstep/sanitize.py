"""Text that may be printed and stored: secrets masked, control characters escaped.

Everything that a command prints goes through `guard_output` (what moves the cursor on a terminal
escapes its texts by itself: commands/terminal.py), every sentence of an error through
`one_line`, and every record of a command (journals, provenance, MLflow) through `mask_secrets`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote, unquote

MASK = "***"
SHORTEST = 6  # letters of a secret that is masked wherever it occurs, also outside of a URI

# user:password before the last @ of a URI's host. A colon before digits and a slash is a port.
USERINFO = re.compile(
    r"(?<=://)(?:[^\s/?#@:\[]{0,200}:(?!\d{1,5}(?:[/?#\s]|$))\S{0,500}|[^\s/?#@]{1,500})(?=@)"
)
QUERY = re.compile(  # ?token=..., &X-Amz-Signature=...
    r"(?<=[?&;#])(?!viewStateShareKey=)"  # the name of a view in MLflow, which is no secret
    r"([\w.-]{0,60}(?:token|password|passwd|pwd|secret|key|keyid|signature|credential"
    r"|auth|code|odbc_connect)|sig)=[^\s&;#'\"<>]+",
    re.IGNORECASE,
)
SETTING = re.compile(  # password=... among the words of a connection string, or as a flag
    r"(?<![\w?&;#])(?<!\w-)(password|passwd|secret|token|api_?key|access_?key)(\s?=\s?)"
    r"(?:'[^']*'|\"[^\"]*\"|[^\s,;&'\")]+)",
    re.IGNORECASE,
)
HEADER = re.compile(r"\b(authorization\W{1,5}(?:basic |bearer |token )?)[^\s'\",)]+", re.IGNORECASE)
TOKEN = re.compile(r"\b(hf_|ghp_|github_pat_)\w{16,}")
SECRET_NAME = re.compile(  # of an environment variable whose whole value is a secret
    r"(?:(?:^|_)(?:TOKEN|SECRET|API_?KEY|ACCESS_KEY|SECRET_KEY)|PASSWORD|PASSWD)$", re.IGNORECASE
)

# C0 and C1 but tab and line feed, marks and overrides of the writing direction, the separators of
# lines and paragraphs, and the surrogates that stand for undecodable bytes of a file's name.
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
CURSOR_UP = re.compile(r"(?:\x1b\[A)+")  # what several progress bars write, and nothing else

_words: list[str] = []


def remember_secrets(words: Iterable[str]) -> None:
    """Mask from now on, wherever they occur, also the passwords in these words of a command."""
    _words[:] = words


def mask_secrets(value: Any) -> Any:
    """A text, or the texts in nested dicts and lists, with *** in place of passwords and tokens.

    Masked are: the user information of a URI, values of a query such as token=, words such as
    password=, authorization headers, tokens of the hub, and the secrets that are known from the
    environment and the command line.
    """
    return _mask(value, _known_secrets())


def escape_controls(text: str) -> str:
    r"""The text with control characters written as \x1b or \u202e; tab and line feed stay."""
    return CONTROL.sub(lambda found: _escaped(found[0]), text)


def one_line(text: str) -> str:
    """The text on one line, without secrets and control characters."""
    shown = escape_controls(mask_secrets(text))
    return shown.replace("\n", "\\n").replace("\t", "\\t")


def shorten(text: str, most: int = 80) -> str:
    """The text on one line as in `one_line`; of a longer one than `most`, its beginning and end."""
    text = one_line(text)
    return text if len(text) <= most else f"{text[: most * 5 // 8]} ... {text[-most // 4 :]}"


def guard_output() -> None:
    """From now on stdout and stderr of this process mask secrets and escape control characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, GuardedStream):
            setattr(sys, name, GuardedStream(stream))


class GuardedStream:
    """A text stream that masks secrets and escapes control characters in all that is written."""

    def __init__(self, stream: Any):
        self._stream = stream

    @property
    def unguarded(self) -> Any:
        """The stream itself, for a program that escapes its texts and moves the cursor."""
        return self._stream

    def write(self, text: str) -> int:
        """Write the text. A progress bar may still go to the start of its line, or one line up."""
        start, rest = ("\r", text[1:]) if text.startswith("\r") else ("", text)
        if not CURSOR_UP.fullmatch(rest):
            rest = escape_controls(mask_secrets(rest))
        self._stream.write(start + rest)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _escaped(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _mask(value: Any, known: list[str]) -> Any:
    if isinstance(value, dict):
        return {_mask(key, []): _mask(item, known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mask(item, known) for item in value]
    if not isinstance(value, str):
        return value
    value = _mask_patterns(value)
    for secret in known:
        value = value.replace(secret, MASK)
    return value


def _mask_patterns(text: str) -> str:
    if "://" in text:
        text = USERINFO.sub(MASK, text)
    if "=" in text:
        text = QUERY.sub(rf"\1={MASK}", text)
        text = SETTING.sub(rf"\1\2{MASK}", text)
    text = HEADER.sub(rf"\1{MASK}", text)
    return TOKEN.sub(rf"\1{MASK}", text)


def _known_secrets() -> list[str]:
    """Secrets of the environment and the command line, in each spelling, the longest first."""
    found = set()
    for name, value in os.environ.items():
        if SECRET_NAME.search(name):
            found.add(value)
        elif name.lower().endswith("_proxy") and "://" not in value:
            found.update(_secrets_in(f"http://{value}"))
        else:
            found.update(_secrets_in(value))
    for word in _words:
        found.update(_secrets_in(word))
    spelled = {way for secret in found for way in (secret, unquote(secret), quote(secret, safe=""))}
    return sorted((word for word in spelled if len(word) >= SHORTEST), key=len, reverse=True)


def _secrets_in(text: str) -> Iterator[str]:
    """The passwords and tokens of a URI; not one that is also a name in this URI."""
    if "://" not in text:
        return
    rest = _mask_patterns(text)
    userinfo = re.search(r"://([^/?#@:]*)(?::(.*))?@", text, re.DOTALL)
    found = [userinfo[2] or userinfo[1]] if userinfo else []
    found += [match[0].partition("=")[2] for match in QUERY.finditer(text)]
    yield from (secret for secret in found if secret not in rest)
