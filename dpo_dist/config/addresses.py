"""Paths that are URLs, and what of them may be shown."""

import re

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_USER = re.compile(r"(?<=://)[^/\s]*(?=@)")
_WEB = re.compile(r"https?://", re.IGNORECASE)
# Everywhere else a question mark may stand in a name, or in a pattern: `s3://bucket/pairs-?.jsonl`.
_WEB_QUERY = re.compile(r"(https?://[^\s?'\")]*\?)(?!\*{3})[^\s'\")]+", re.IGNORECASE)
_QUERY = re.compile(r"(\w://[^\s?'\")]*\?)[\w.~%-]+=[^\s'\")]*")
# Of an address that is given as a whole. A colon with no port behind it is a password's, which then holds a slash.
_USER_OF_ONE = re.compile(r"(?<=://)(?:[^/?#]*(?=@)|[^/?#@]*:(?!\d*[/?#])[^?]*(?=@))")
_QUERY_OF_ONE = re.compile(r"[\w.~%-]+=.*", re.DOTALL)
_HIDDEN = "***"


def is_url(path: str) -> bool:
    """Whether a path is one of another machine, such as s3://bucket/pairs.jsonl."""
    return _URL.match(path) is not None


def is_web(path: str) -> bool:
    """Whether a path is that of a web server, which has no folders and no patterns."""
    return _WEB.match(path) is not None


def shown_url(url: str) -> str:
    """A URL with its user, password and query hidden, whatever characters are in them."""
    url = _USER_OF_ONE.sub(_HIDDEN, url, count=1)
    beginning, mark, query = url.partition("?")
    if mark and query and (is_web(url) or _QUERY_OF_ONE.fullmatch(query)):
        return f"{beginning}?{_HIDDEN}"
    return url


def without_secrets(text: str) -> str:
    """The same text, with user, password and query of every URL in it hidden: a signed query opens what it names."""
    for pattern, shown in ((_USER, _HIDDEN), (_WEB_QUERY, rf"\1{_HIDDEN}"), (_QUERY, rf"\1{_HIDDEN}")):
        text = pattern.sub(shown, text)
    return text
