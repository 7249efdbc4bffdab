"""One self-contained page: sections of text, tables, figures and examples, from any room.

    write_report(Path("report.html"), "A title", [Section("Scores", tables=[Table(("who", "mean"), [("a", "0.1")])])])

The page links to nothing and opens from disk. Text from data is escaped by the template; figures lie beside it as PNGs.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from submission.backends import require
from submission.data.files import atomic_path, atomic_writer
from submission.data.outputs import made_files


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; all columns but the first hold figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture.

    Attributes:
        name: of its file.
        png: its content.
        caption: what to see; read aloud to those who cannot.
    """

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True, slots=True)
class Words:
    """A stretch of text; `mark` is "removed", "added" or "" for what is on both sides."""

    text: str
    mark: str = ""


@dataclass(frozen=True, slots=True)
class ReportExample:
    """A row: texts side by side, and what was answered.

    Attributes:
        title: of the row.
        texts: heading and content of each.
        answers: who says what, and its score.
    """

    title: str
    texts: Sequence[tuple[str, Sequence[Words]]]
    answers: Table


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page, with an entry in its list of contents."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    examples: Sequence[ReportExample] = ()

    @property
    def anchor(self) -> str:
        """What links within the page lead to."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def write_report(path: Path, title: str, sections: Sequence[Section]) -> list[Path]:
    """Write the page, and its figures beside it as `NAME-figure.png`.

    Returns:
        the files that were written, the page first.

    Raises:
        UserError: a file of the user's has one of their names.
    """
    require("jinja2", "eval", "a report")
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["plain"] = _plain
    environment.filters["data_url"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    source = resources.files("eval").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(source).render(title=title, sections=sections)
    figures = {path.with_name(f"{path.stem}-{figure.name}.png"): figure.png
               for section in sections for figure in section.figures}  # fmt: skip
    written = [path, *figures]
    with made_files(path, written, {"title": title}):
        with atomic_writer(path) as file:
            file.write(page)
        for place, png in figures.items():
            with atomic_path(place) as temporary:
                temporary.write_bytes(png)
    return written


def _plain(text: str) -> str:
    """Text without what a browser cannot show: control characters and lone surrogates."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)
    return shown.encode("utf-8", "replace").decode("utf-8")
