"""What a micro-batch may begin with, as far as its own shapes and numbers say, and those of its session."""

from __future__ import annotations

import numpy as np

from . import messages as m
from .counting import counted_tokens
from .errors import ViolationError
from .micro_batch import Shapes
from .passes import MOST_PIECES, may_send_early
from .tensors import WireTensor
from .wire_codecs import TensorRole


def check_opening(message: m.OpenSession, welcome: m.Welcome) -> None:
    """Raise ``ViolationError`` unless a session may be opened so."""
    purpose = message.purpose
    if not all(group.targets for group in message.groups):
        raise ViolationError("a group without target modules")
    if isinstance(purpose, m.Train) and purpose.next_step > purpose.total_steps:
        raise ViolationError("next_step lies after the end of the run")
    if message.context_length > welcome.max_context_length:
        text = f"a context of {message.context_length} tokens; at most {welcome.max_context_length} fit"
        raise ViolationError(text, m.ErrorCode.LIMIT)
    if isinstance(purpose, m.Use) and purpose.lends and purpose.passes is not None:
        raise ViolationError("passes of an adapter that is lent")
    if isinstance(purpose, m.Encode) and message.groups:
        raise ViolationError("groups in a session that only encodes")
    if message.window > welcome.window:
        raise ViolationError(f"a window of {message.window} micro-batches; at most {welcome.window} fit")


def check_embeddings(message: m.Embeddings, shapes: Shapes) -> None:
    """Raise ``ViolationError`` unless a micro-batch may begin so, as far as its own shapes and numbers say."""
    welcome = shapes.welcome
    if (message.hidden_states is None) is (message.token_ids is None):
        raise ViolationError("neither embeddings nor token ids, or both")
    if message.hidden_states is not None:
        shapes.check(message.hidden_states, TensorRole.EMBEDDINGS, (None, welcome.embedding_size))
    if message.token_ids is not None:
        message.token_ids.check("int32", (None,))
    message.sequence_lengths.check("int32", (None,))
    tokens, lengths = message.tokens, message.sequence_lengths.data
    if not 0 < tokens <= welcome.max_tokens:
        raise ViolationError(f"{tokens} tokens; at most {welcome.max_tokens} fit", m.ErrorCode.LIMIT)
    if not lengths.size or lengths.min() < 1 or int(lengths.sum(dtype=np.int64)) != tokens:
        raise ViolationError("sequence lengths that do not add up to the tokens")
    counted = counted_tokens(lengths, packs=welcome.packs)
    if counted > welcome.max_tokens:
        text = f"{tokens} tokens count as {counted} with their padding; at most {welcome.max_tokens} fit"
        raise ViolationError(text, m.ErrorCode.LIMIT)
    if lengths.max() > welcome.max_sequence_length:
        limit = welcome.max_sequence_length
        raise ViolationError(f"a sequence of {lengths.max()} tokens; at most {limit} fit", m.ErrorCode.LIMIT)
    _check_positions(message.label_positions, tokens, "label positions")
    if (message.mode == "encode") is bool(message.label_positions.shape[0]):
        raise ViolationError("no label positions, or some in the mode encode")
    if message.mode == "encode" and lengths.size > m.MAX_ENCODED_SEQUENCES:
        text = f"{lengths.size} sequences in the mode encode; at most {m.MAX_ENCODED_SEQUENCES} fit"
        raise ViolationError(text, m.ErrorCode.LIMIT)
    if message.mode == "encode" and (message.crossing_positions or message.examples):
        raise ViolationError("crossing positions, or examples, in the mode encode")
    if message.crossing_positions is not None:
        _check_positions(message.crossing_positions, tokens, "crossing positions")
    if message.examples is not None:
        message.examples.check("int32", (lengths.size,))
    # In fp16 all of a message have one exponent: what was read in other company is stored otherwise.
    may_be_kept = message.passes is not None and message.mode == "train" and shapes.codecs.group_input != "fp16"
    if message.kept_reads is not None and not may_be_kept:
        raise ViolationError("kept reads that are not of training in passes, or are stored in fp16")
    if message.kept_reads is not None and not may_send_early(shapes.crossings, message.rows):
        raise ViolationError(f"kept reads of so many rows that what is written takes more than {MOST_PIECES} messages")
    if message.passes is not None and message.mode not in ("train", "evaluate", "decode"):
        raise ViolationError(f"passes in the mode {message.mode}")
    if (message.mode == "decode") is (message.decoding is None) or (message.mode == "decode" and lengths.size > 1):
        raise ViolationError("a position belongs to the one sequence of the mode decode")


def check_decoding(begun: m.Embeddings, opening: m.OpenSession, shapes: Shapes, cached_tokens: int, ahead: int) -> None:
    """Raise ``ViolationError`` unless C can go on with a micro-batch of the mode ``decode``.

    Args:
        cached_tokens: of which C holds keys and values; ahead: of how many tokens after the last micro-batch it has
            sent what groups read.
    """
    purpose, decoding = opening.purpose, begun.decoding
    assert decoding is not None
    if isinstance(purpose, m.Train) or not purpose.context_length:
        raise ViolationError("a micro-batch of the mode decode, in a session that has no context length")
    if decoding.position > cached_tokens:
        raise ViolationError(f"tokens from position {decoding.position} on, where only {cached_tokens} are held")
    end = decoding.position + begun.tokens
    if end + decoding.guesses > purpose.context_length:
        text = f"a context of {end + decoding.guesses} tokens; this session has room for {purpose.context_length}"
        raise ViolationError(text, m.ErrorCode.LIMIT)
    if begun.passes != (purpose.passes if isinstance(purpose, m.Use) else None):
        raise ViolationError("other passes than the session's")
    crossing = begun.crossing_positions
    acts_to_end = crossing is None or not crossing.shape[0] or crossing.data[0] == begun.tokens - crossing.shape[0]
    is_in_order = begun.passes is None and not (isinstance(purpose, m.Use) and purpose.lends)
    if not is_in_order and not acts_to_end:
        raise ViolationError("adapters that act in passes, or are lent, but not from some token on")
    if decoding.guesses and purpose.drafts is None:
        raise ViolationError("guesses of C, in a session that asks for none")
    if begun.tokens + decoding.guesses > shapes.welcome.max_tokens:
        raise ViolationError(f"{begun.tokens + decoding.guesses} tokens, guesses among them", m.ErrorCode.LIMIT)
    if decoding.drafts and int(begun.label_positions.data[-1]) != begun.tokens - 1:
        raise ViolationError("guesses after a token whose last hidden state is not asked for")
    if decoding.ahead is not None and not may_send_early(shapes.crossings, 1 + decoding.ahead):
        raise ViolationError(f"ahead, where what is written takes more than {MOST_PIECES} messages")
    if (decoding.ahead is not None or decoding.is_ahead) and begun.passes is None:
        raise ViolationError("ahead, where groups are asked live")
    if decoding.is_ahead and (begun.tokens != ahead or decoding.drafts or begun.crossing_positions is not None):
        raise ViolationError("tokens that C has not gone on with")


def _check_positions(tensor: WireTensor, tokens: int, name: str) -> None:
    tensor.check("int32", (None,))
    positions = tensor.data
    if not positions.size:
        return
    if positions[0] < 0 or positions[-1] >= tokens or (positions[1:] <= positions[:-1]).any():
        raise ViolationError(f"{name} that are not ascending rows of the tokens")
