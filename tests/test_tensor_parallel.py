"""A base model whose weights are divided among processes computes what it computes in one; and what becomes of a
server that loses one of them."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import psutil
import pytest
import torch
from families import VOCABULARY, tiny_model
from processes import END_TIMEOUT_S, CloudProcess, cloud_process, run_cloud
from serving import config, random_dataset, serving, training
from test_cli import assert_fails, free_port
from test_low_bits import in_dtype, outputs_and_gradient
from test_placement import RUNS, answers
from test_replicas import PATIENT
from tiny import TinyFactory
from torch import Tensor
from training_runs import bits
from transformers import PreTrainedModel

from dlora.cloud.model.base_model import BaseModel, load_base_model
from dlora.cloud.model.divided_linear import DividedLinear, divide
from dlora.cloud.model.held_linear import bytes_of_weights
from dlora.cloud.model.low_bits import hold_in_low_bits
from dlora.cloud.model.worker import Rows
from dlora.cloud.model.workers import WorkerLostError, Workers
from dlora.protocol.choices import WeightFormat
from dlora.protocol.errors import ExportError, UsageError

PROCESSES = 3  # so that few widths of a tiny model can be divided evenly
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    started = Workers(PROCESSES)
    yield started
    started.close()
    assert all(worker.poll() == 0 for worker in started._workers)


def divided(
    family: str, workers: Workers, dtype: torch.dtype = torch.float32, weight_format: WeightFormat = "full"
) -> PreTrainedModel:
    model = in_dtype(tiny_model(family), dtype)
    hold_in_low_bits(model, weight_format)
    divide(model, workers)
    return model


def difference(found: Tensor, wanted: Tensor) -> float:
    """Relative, of the norms."""
    return float((found.double() - wanted.double()).norm() / max(float(wanted.double().norm()), 1e-30))


def base_of(tiny: TinyFactory, family: str, workers: Workers) -> BaseModel:
    return load_base_model(str(tiny(family).model), workers=workers)


# --- the same model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "stablelm", "qwen3_moe", "gemma2"])
def test_outputs_and_gradients_are_those_of_one_process(family: str, workers: Workers) -> None:
    plain = in_dtype(tiny_model(family), torch.float32)
    for found, wanted in zip(outputs_and_gradient(divided(family, workers)), outputs_and_gradient(plain), strict=True):
        assert difference(found, wanted) < TOLERANCE


@pytest.mark.parametrize("weight_format", ["int8", "nf4"])
def test_few_bits_are_divided_too(weight_format: WeightFormat, workers: Workers) -> None:
    plain = in_dtype(tiny_model("llama"), torch.float32)
    hold_in_low_bits(plain, weight_format)
    model = divided("llama", workers, weight_format=weight_format)
    for found, wanted in zip(outputs_and_gradient(model), outputs_and_gradient(plain), strict=True):
        assert difference(found, wanted) < TOLERANCE


def test_bfloat16_forward_passes_are_the_same_bits(workers: Workers) -> None:
    """Each output is a sum over all inputs, wherever it is computed."""
    found = outputs_and_gradient(divided("llama", workers, torch.bfloat16))
    wanted = outputs_and_gradient(in_dtype(tiny_model("llama"), torch.bfloat16))
    assert torch.equal(found[0], wanted[0])
    assert difference(found[1], wanted[1]) < 0.01


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_base_model_is_the_same(family: str, workers: Workers, tiny: TinyFactory) -> None:
    base, plain = base_of(tiny, family, workers), tiny(family).base
    assert (base.fingerprint, base.parameters, list(base.targets)) == (
        plain.fingerprint, plain.parameters, list(plain.targets),
    )  # fmt: skip
    for name, target in base.targets.items():
        assert isinstance(target.module, DividedLinear)
        assert torch.equal(target.weight, plain.targets[name].weight)
        assert len(target.module.held_values) == -(-target.out_features // PROCESSES)
    elsewhere = sum(
        (target.out_features - -(-target.out_features // PROCESSES)) * target.in_features * 4
        for target in base.targets.values()
    )
    assert bytes_of_weights(base.model) == bytes_of_weights(plain.model) - elsewhere


def test_what_modules_share_crosses_once(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v get one tensor, gate and up as well."""
    from dlora.cloud.model import workers as module

    model, sent = divided("llama", workers), 0
    isend = module.dist.isend

    def counted(tensor: torch.Tensor, rank: int) -> object:
        nonlocal sent
        sent += 1
        return isend(tensor, rank)

    monkeypatch.setattr(module.dist, "isend", counted)
    embeds = torch.ones(1, 3, model.config.hidden_size)
    with torch.no_grad():
        model.base_model(inputs_embeds=embeds, use_cache=False)
        assert sent == 4 * model.config.num_hidden_layers * (PROCESSES - 1)
        embeds.mul_(2)  # the same tensor, with something else in it
        found = model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        wanted = tiny_model("llama").eval().base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    assert difference(found, wanted) < TOLERANCE


def test_a_product_that_fails_here_leaves_no_answer_for_the_next(workers: Workers) -> None:
    weight = torch.arange(12.0).view(6, 2)
    number = workers.hold([(weight[2:4],), (weight[4:],)], [None, None], torch.float32)

    class Failing(Rows):
        def multiply(self, x: Tensor) -> Tensor:
            raise MemoryError

    with pytest.raises(MemoryError):
        workers.multiply(number, torch.ones(1, 2), [2, 2], Failing([weight[:2]], None, torch.float32))
    x = torch.tensor([[1.0, -1.0]])
    assert torch.equal(workers.multiply(number, x, [2, 2], Rows([weight[:2]], None, torch.float32)), x @ weight.T)
    assert workers.lost is None


def test_a_model_without_ordinary_linear_modules_is_refused(workers: Workers) -> None:
    with pytest.raises(ExportError, match=r"\(gpt2\) cannot be divided: .* serve it without --tensor-parallel"):
        divide(cast(PreTrainedModel, tiny_model("gpt2")), workers)


# --- the same runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("run", RUNS)
def test_losses_and_adapters_are_the_same_to_a_hundred_thousandth(
    run: str, family: str, workers: Workers, tiny: TinyFactory
) -> None:
    changes, dataset = RUNS[run]
    bundle = tiny(family, head_dtype="fp32").bundle
    found = []
    for base in (tiny(family).base, base_of(tiny, family, workers)):
        settings = config(total_steps=4, **changes)
        with serving(base) as server, training(bundle, server.url, settings, dataset) as trainer:
            losses = [trainer.run_step().loss for _ in range(4)]
            state = {name: torch.from_numpy(np.array(each)) for name, each in trainer.adapters.state().items()}
            found.append(([*losses, trainer.evaluate(dataset).loss], state))
    (losses, adapters), (losses_divided, adapters_divided) = found
    assert losses_divided == pytest.approx(losses, rel=TOLERANCE)
    assert adapters.keys() == adapters_divided.keys()
    for name, wanted in adapters.items():
        assert difference(adapters_divided[name], wanted) < TOLERANCE, name


def test_answers_are_the_same(workers: Workers, tiny: TinyFactory) -> None:
    bundle = tiny(head_dtype="fp32").bundle
    assert answers(base_of(tiny, "llama", workers), bundle) == answers(tiny().base, bundle)


# --- processes ------------------------------------------------------------------------------------------------------


def test_a_process_that_does_not_start_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerLostError, match=r"process 2 of the 2 of the server ended \(exit code 1\)"):
        Workers(2)


def test_options_that_do_not_go_together(tiny: TinyFactory) -> None:
    both = run_cloud("serve", tiny().model, "--tensor-parallel", "2", "--device-map", "auto")
    assert_fails(both, UsageError.exit_code, "--device-map and --tensor-parallel both divide the model; give one")


@contextmanager
def two_processes(model: Path, directory: Path, port: int) -> Iterator[tuple[CloudProcess, psutil.Process]]:
    """A server of two processes, and the other one."""
    with cloud_process(model, directory, "--port", port, "--tensor-parallel", 2) as cloud:
        (other,) = psutil.Process(cloud.process.pid).children()
        yield cloud, other


def test_a_lost_process_ends_the_server_and_devices_go_on_once_it_is_back(tiny: TinyFactory, tmp_path: Path) -> None:
    """Killed between two steps, and while a product is waited for."""
    model, bundle, port = tiny().model, tiny(head_dtype="fp32").bundle, free_port()
    url, run, dataset = f"ws://127.0.0.1:{port}", config(), random_dataset(VOCABULARY)
    with two_processes(model, tmp_path, port) as (cloud, other):
        assert cloud.hello["tensor_parallel"] == 2
        with training(bundle, url, run, dataset) as trainer:
            wanted = [trainer.run_step().loss for _ in range(4)], bits(trainer)
        assert cloud.end() == 0
        assert not other.is_running()
    with ExitStack() as device:
        with two_processes(model, tmp_path, port) as (cloud, other):
            trainer = device.enter_context(training(bundle, url, run, dataset, PATIENT))
            losses = [trainer.run_step().loss]
            other.kill()
            assert_lost(cloud)
        with two_processes(model, tmp_path, port) as (cloud, other), ThreadPoolExecutor(1) as thread:
            losses.append(trainer.run_step().loss)
            other.suspend()
            step = thread.submit(trainer.run_step)
            time.sleep(0.3)  # a product is waited for by now; where not, this is the case above
            other.kill()
            assert_lost(cloud)
            with two_processes(model, tmp_path, port):
                losses += [step.result().loss, trainer.run_step().loss]
                assert (losses, bits(trainer)) == wanted


def assert_lost(cloud: CloudProcess) -> None:
    """It ends with one line, which says why."""
    assert cloud.process.wait(END_TIMEOUT_S) == 1
    log = cloud.log.read_text()
    assert log.splitlines()[-1].startswith("error: process 2 of the 2 of the server ended (SIGKILL); ")
    assert "Traceback" not in log


def test_nothing_is_left_of_a_server_that_is_killed(tiny: TinyFactory, tmp_path: Path) -> None:
    with two_processes(tiny().model, tmp_path, free_port()) as (cloud, other):
        cloud.end(signal.SIGKILL)
        other.wait(END_TIMEOUT_S)
        assert "Traceback" not in cloud.log.read_text()
