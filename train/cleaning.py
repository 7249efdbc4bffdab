"""What is done to every triplet before anything is judged: the rules of the notebooks that
this project grew from ("the seed"), each of which can be switched off.

>>> clean_prompt("Rewrite  this ,as a poem .", Cleaning())
'Rewrite this,as a poem'
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from submission.data.tables import has_text

_BEFORE_MARK = re.compile(r"\s+([?.!,':;])")


@dataclass(frozen=True, slots=True)
class DataRow:
    """A triplet with its provenance; `kind` and `style` are blank where the source does not tell them."""

    id: str
    original_text: str
    rewritten_text: str
    rewrite_prompt: str
    source: str = ""
    kind: str = ""
    style: str = ""


@dataclass(frozen=True, slots=True)
class Cleaning:
    """Rules; the first three change prompts, the others drop rows. A cap of 0 is off.

    Attributes:
        collapse_whitespace: runs of whitespace in the prompt become one blank.
        no_space_before_marks: no blank before ? . ! , ' : ;
        strip_end: no . ? or ! at the prompt's end.
        ascii_prompts: drop prompts with other characters.
        blanks: drop rows with a blank text or prompt.
        duplicates: drop rows that are the same as an earlier one.
        max_prompt_chars: the seed had 80.
        max_original_chars: the seed had 4000, and 1000 out of distribution.
        max_rewritten_chars: likewise.
        max_rows: of a source; the seed had 1000.
    """

    collapse_whitespace: bool = True
    no_space_before_marks: bool = True
    strip_end: bool = True
    ascii_prompts: bool = True
    blanks: bool = True
    duplicates: bool = True
    max_prompt_chars: int = 0
    max_original_chars: int = 4000
    max_rewritten_chars: int = 0
    max_rows: int = 0


def clean_prompt(prompt: str, rules: Cleaning) -> str:
    """A prompt by the rules that change it; never longer, and cleaning it again changes nothing."""
    while True:
        before = prompt
        if rules.collapse_whitespace:
            prompt = " ".join(prompt.split())
        if rules.no_space_before_marks:
            prompt = _BEFORE_MARK.sub(r"\1", prompt)
        if rules.strip_end:
            prompt = prompt.rstrip().rstrip(".?!")
        if prompt == before:
            return prompt


class Cleaner:
    """Applies the rules to the rows of a source in order.

    Args:
        rules: which.
        seen: digests of the rows that were kept, of all sources; it grows.
    """

    def __init__(self, rules: Cleaning, seen: set[bytes]) -> None:
        self._rules = rules
        self._seen = seen
        self._kept = 0

    def __call__(self, row: DataRow) -> tuple[DataRow, str]:
        """The cleaned row, and why it is dropped; "" if it stays."""
        row = replace(row, rewrite_prompt=clean_prompt(row.rewrite_prompt, self._rules))
        digest = _digest(row)
        reason = next(self._reasons(row, digest), "")
        if not reason:
            self._kept += 1
            self._seen.add(digest)
        return row, reason

    def _reasons(self, row: DataRow, digest: bytes) -> Iterator[str]:
        rules = self._rules
        cells = {"original_text": row.original_text, "rewritten_text": row.rewritten_text,
                 "rewrite_prompt": row.rewrite_prompt}  # fmt: skip
        if rules.blanks:
            yield from (f"blank {name}" for name, text in cells.items() if not has_text(text))
        if rules.ascii_prompts and not row.rewrite_prompt.isascii():
            yield "prompt has characters beyond ASCII"
        for name, most in (("rewrite_prompt", rules.max_prompt_chars), ("original_text", rules.max_original_chars),
                           ("rewritten_text", rules.max_rewritten_chars)):  # fmt: skip
            if most and len(cells[name]) > most:
                yield f"{name} longer than {most} characters"
        if rules.duplicates and digest in self._seen:
            yield "duplicate of an earlier row"
        if rules.max_rows and self._kept >= rules.max_rows:
            yield f"beyond the {rules.max_rows} rows of a source"


def _digest(row: DataRow) -> bytes:
    """Of texts and prompt, in place of which it is kept."""
    digest = hashlib.blake2b(digest_size=16)
    for cell in (row.original_text, row.rewritten_text, row.rewrite_prompt):
        content = cell.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()
