"""Take secrets out of command lines before they are shown or kept."""

import re
from collections.abc import Sequence

_SECRET = re.compile(r"(^|_)(tok|toke|token|api_key|password|secret)$")  # argparse takes beginnings of a flag's name
_URL = re.compile(r"([a-z0-9+]+://)(?:[^/\s@]*@)?([^\s?#]*)(\?[^\s#]*)?", re.IGNORECASE)


def is_secret(flag: str) -> bool:
    """Return whether a flag, or the beginning of one, holds a secret by its name."""
    return _SECRET.search(flag.lstrip("-").replace("-", "_").lower()) is not None


def without_secrets(argv: Sequence[str]) -> list[str]:
    """Return a command line without the values of tokens, and without the users and queries of URLs."""
    shown: list[str] = []
    for i, word in enumerate(argv):
        name, equals, _ = word.partition("=")
        if i and argv[i - 1].startswith("--") and is_secret(argv[i - 1]) and not word.startswith("--"):
            shown.append("***")
        elif equals and name.startswith("--") and is_secret(name):
            shown.append(f"{name}=***")
        else:
            shown.append(without_query(word))
    return shown


def without_query(text: str) -> str:
    """Return a text whose URLs have lost user, password and query."""
    return _URL.sub(lambda match: match[1] + match[2] + ("?***" if match[3] else ""), text)
