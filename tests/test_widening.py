"""A model that stays as its files are computes what one computes that was loaded in float32, bit for bit."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from families import FAMILIES, MORE_FAMILIES, save_tiny

from dlora.cloud.model import widening
from dlora.cloud.model.base_model import BaseModel, find_embedding, find_source, load_model
from dlora.cloud.model.widening import compute_in_float32, widened_again

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def _both(directory: Path, family: str, dtype: str) -> tuple[BaseModel, BaseModel]:
    save_tiny(directory / "whole", family).to(HALVES[dtype]).save_pretrained(directory / "half")
    source = find_source(str(directory / "half"))
    narrow = load_model(source, dtype=None)
    compute_in_float32(narrow)
    return BaseModel.from_model(load_model(source), "wide"), BaseModel.from_model(narrow, "narrow")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_computed_is_the_same(family: str, dtype: str, tmp_path: Path) -> None:
    wide, narrow = _both(tmp_path, family, dtype)
    assert narrow.dtype == torch.float32
    assert narrow.model.dtype == HALVES[dtype]
    assert list(narrow.targets) == list(wide.targets)
    assert narrow.fingerprint == wide.fingerprint
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        hidden = [base.last_hidden_state(find_embedding(base)(ids)) for base in (wide, narrow)]
        logits = [base.model(input_ids=ids).logits for base in (wide, narrow)]
    assert torch.equal(*hidden)
    assert torch.equal(*logits)
    assert {parameter.dtype for parameter in narrow.model.parameters()} == {HALVES[dtype]}


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_so_it_is_of_other_families(family: str, tmp_path: Path) -> None:
    wide, narrow = _both(tmp_path, family, "bfloat16")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(wide.model(input_ids=ids).logits, narrow.model(input_ids=ids).logits)


@pytest.mark.parametrize("is_widened_again", [True, False])
def test_gradients_keep_no_wide_weight(is_widened_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a backward pass, weights are widened again: all of them at once would be twice the files."""
    wide, narrow = _both(tmp_path, "llama", "bfloat16")
    made: list[weakref.ref[torch.Tensor]] = []
    original = widening._wide

    def counted(stored: torch.Tensor) -> torch.Tensor:
        found = original(stored)
        if found.ndim == 2:
            made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(widening, "_wide", counted)
    found = []
    for base in (wide, narrow):
        embeds = find_embedding(base)(torch.arange(6)[None]).requires_grad_()
        with widened_again() if is_widened_again else nullcontext():
            hidden = base.last_hidden_state(embeds)
        alive = [each for each in made if each() is not None]
        assert bool(alive) == (base is narrow and not is_widened_again)
        found.append(torch.autograd.grad(hidden.square().sum(), embeds)[0])
    assert len(made) >= len(narrow.targets)
    assert torch.equal(*found)
