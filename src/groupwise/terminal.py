"""The terminal, on which text is text: not markup, and no control codes but those of the styles that we ask for."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from groupwise.text import visible


class Terminal(Console):
    """A console that shows hidden characters as escapes, and brackets as brackets. Our own styles are given as `Text`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Strings, which most of what is printed begins as."""
        return super().render_str(visible(text, lines=True), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Texts with styles, whichever table or panel they are in."""
        if isinstance(renderable, Text) and (shown := visible(renderable.plain, lines=True)) != renderable.plain:
            plain = renderable.blank_copy(shown)
            return super().render(plain, options)
        return super().render(renderable, options)
