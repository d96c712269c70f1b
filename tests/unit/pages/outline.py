"""What a browser makes of a page: its tags and its text."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID = {"meta", "img"}
HOSTILE = "\"'><img src=x onerror=alert(1)></style></script>{{ 7*7 }} \u202e\u05d0 &amp;"
"""Text that would end an attribute, a tag, a style or a script, is a template's, and turns round
what stands behind it."""


class Outline(HTMLParser):
    """Parses a page; fails where tags don't balance, and keeps what they say."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open  # HTML itself has no self-closing tags
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def images(self) -> list[np.ndarray]:
        """Pixels of all embedded images, in order."""
        sources = [str(attrs["src"]) for tag, attrs in self.tags if tag == "img"]
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))
            for uri in sources
        ]

    def structure(self) -> list[tuple[str, tuple[str, ...]]]:
        """Tags with the names of their attributes, in order."""
        return [(tag, tuple(attrs)) for tag, attrs in self.tags]


def assert_stands_alone(page: str) -> None:
    """Fails where a page loads something, or may run a script or style that isn't its own."""
    for tag, attrs in Outline(page).tags:
        assert tag not in ("link", "iframe", "object", "base")
        assert "href" not in attrs
        assert not any(name.startswith("on") for name in attrs)
        if "src" in attrs:
            assert tag == "img" and str(attrs["src"]).startswith("data:image/")
        if tag == "th":
            assert attrs["scope"] in ("col", "row")
    assert not re.search(r"https?:|url\(|@import|\bimport\b", page)
    for tag in ("script", "style"):
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        assert len(contents) <= 1
        for content in contents:
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in page
        assert contents or f"{tag}-src" not in page
    assert "default-src 'none'" in page
