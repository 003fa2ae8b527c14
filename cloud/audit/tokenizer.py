"""The truth's tokenizer, in a child process: it is a file of whoever recorded, and nearly a program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from dlora.protocol.child import Child, Note, Work, library_errors
from dlora.protocol.errors import DataError
from dlora.protocol.recording import TOKENIZER_FILE, TRUTH_DIRECTORY, TRUTH_FILE, find_recorded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_CHARACTERS: Final = 1000  # of a token; the longest in vocabularies are runs of some 100 blanks or dashes
_ADVICE: Final = "record it again, or remove the file: tokens are then shown as numbers"


class TruthTokenizer:
    """Makes text of token ids."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def decode(self, ids: Sequence[int]) -> str:
        """Their text, with special tokens. Raises ``DataError``, also where the file asks for too much of anything."""
        (text,) = self._child.call(msgspec.msgpack.encode(list(ids)))
        return text.decode()


@contextmanager
def truth_tokenizer(truth: Path) -> Iterator[TruthTokenizer | None]:
    """The tokenizer beside a truth, for as long as the context; None where there is none.

    Enter it before there are threads, as a progress bar has. Raises ``DataError`` for one that cannot be read.
    """
    path = find_recorded(truth, TRUTH_DIRECTORY, TRUTH_FILE).with_name(TOKENIZER_FILE)
    if not path.is_file():
        yield None
        return
    note = Note(_ADVICE)
    with Child(_worker(path, note), note) as child:
        tokenizer = TruthTokenizer(child)
        tokenizer.decode(())  # what is wrong with the file is said at once
        yield tokenizer


def _worker(path: Path, note: Note) -> Work:
    @cache
    def tokenizer() -> Tokenizer:
        from tokenizers import Tokenizer  # here, in the child

        with library_errors(DataError, f"{path} is no tokenizer that can be read", _ADVICE):
            return Tokenizer.from_file(str(path))

    def answer(request: bytes) -> Sequence[bytes]:
        note.set_place(str(path), DataError)
        ids = msgspec.msgpack.decode(request, type=list[int])
        with library_errors(DataError, f"{path} cannot make text of tokens", _ADVICE):
            text = str(tokenizer().decode(ids, skip_special_tokens=False))
        if len(text) > MOST_CHARACTERS * len(ids):
            raise DataError(f"{path} makes {len(text):,} characters of {len(ids):,} tokens; {_ADVICE}")
        return (text.encode(errors="replace"),)

    return answer
