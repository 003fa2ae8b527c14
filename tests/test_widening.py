"""A model that stays as its files are computes what one computes that was loaded in float32, bit for bit."""

from __future__ import annotations

import json
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from families import ALL_FAMILIES, FAMILIES, MORE_FAMILIES, random_model, save_tiny, tiny_model
from type_configs import tiny_config

from dlora.cloud.model import widening
from dlora.cloud.model.base_model import BaseModel, find_embedding, find_source, load_model
from dlora.cloud.model.fingerprint import fingerprint
from dlora.cloud.model.widening import compute_in_float32, widened_again
from dlora.protocol.errors import ExportError

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def _both(directory: Path, family: str, dtype: str) -> tuple[BaseModel, BaseModel]:
    model = tiny_model(family) if family in ALL_FAMILIES else random_model(tiny_config(family))
    model.to(HALVES[dtype]).save_pretrained(directory / "half")
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


@pytest.mark.parametrize(("files", "said"), [("float32", "float16"), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_files_count_and_not_what_the_config_says(files: str, said: str, tmp_path: Path) -> None:
    """Or weights would be rounded, and the bundle be of no server's model."""
    save_tiny(tmp_path).to(getattr(torch, files)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": said}))
    source = find_source(str(tmp_path))
    narrow = load_model(source, dtype=None)
    assert narrow.dtype == getattr(torch, files)
    assert fingerprint(narrow) == fingerprint(load_model(source))


def test_a_head_that_does_more_is_refused_in_half_precision_too(tmp_path: Path) -> None:
    class Louder(torch.nn.Linear):
        """Not what its base class computes."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 3

    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama").to(dtype)
        model.lm_head.__class__ = Louder
        compute_in_float32(model)
        with pytest.raises(ExportError, match="does more between token ids and logits"):
            BaseModel.from_model(model, "mine")


def test_what_changes_in_place_is_noticed_where_weights_are_widened_again() -> None:
    with widened_again():
        x = torch.ones(3, requires_grad=True)
        y = x.exp()
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("family", ["llama", "jetmoe"])
@pytest.mark.parametrize("is_widened_again", [True, False])
def test_gradients_keep_no_wide_weight(
    family: str, is_widened_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a backward pass, weights are widened again: all of them at once would be twice the files; and of a mixture's
    experts all of them once for each."""
    wide, narrow = _both(tmp_path, family, "bfloat16")
    made: list[weakref.ref[torch.Tensor]] = []
    original = widening._wide

    def counted(stored: torch.Tensor) -> torch.Tensor:
        found = original(stored)
        if found.ndim >= 2:
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
