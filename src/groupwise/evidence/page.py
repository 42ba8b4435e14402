"""Render templates to self-contained HTML files that open from disk, without a server or a network."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, select_autoescape

from groupwise.errors import UserError
from groupwise.text import json_line, visible


def render(template: str, **values: Any) -> str:
    """Render a template of this package. Values are HTML-escaped, with hidden characters shown, unless the template marks them
    `safe`."""
    environment = Environment(autoescape=select_autoescape(default=True, default_for_string=True), finalize=_finalized)
    return environment.from_string(asset(template)).render(**values)


def _finalized(value: Any) -> Any:
    return visible(value, lines=True) if type(value) is str else value  # what is `safe` is a Markup


def write(out: Path, page: str) -> None:
    """Write a page, with its parent directories.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error


def asset(name: str) -> str:
    """The text of a file in `templates`."""
    return (files("groupwise.evidence") / "templates" / name).read_text(encoding="utf-8")


def embed(value: Any) -> str:
    """JSON for a script element: "</" and "<!--" are escaped, so that no string in it can end or comment out the element. Texts
    that are to be read must be `visible` before."""
    return json_line(value, (",", ":")).replace("</", "<\\/").replace("<!--", "<\\u0021--")


def embed_script(script: str) -> str:
    """A script for a script element: "</script" in its strings is escaped, so that it cannot end the element."""
    return script.replace("</script", "<\\/script")
