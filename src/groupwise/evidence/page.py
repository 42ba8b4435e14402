"""Pages that work from disk: templates filled in, everything they need inside them."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, select_autoescape

from groupwise.errors import UserError


def render(template: str, **values: Any) -> str:
    """A template of this package, filled in; text is escaped unless the template says that it is safe."""
    return (
        Environment(autoescape=select_autoescape(default=True, default_for_string=True))
        .from_string(asset(template))
        .render(**values)
    )


def write(out: Path, page: str) -> None:
    """Raises:
    UserError: it cannot be written there.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error


def asset(name: str) -> str:
    return (files("groupwise.evidence") / "templates" / name).read_text(encoding="utf-8")


def embed(value: Any) -> str:
    """JSON that can stand in a script element, whatever text it holds."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/").replace("<!--", "<\\u0021--")


def embed_script(script: str) -> str:
    """A script that can stand in a script element."""
    return script.replace("</script", "<\\/script")
