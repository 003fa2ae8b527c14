"""Whatever happens, wherever in a step: the same adapter, bit for bit, and every step once.

Each run tries a part of the cases, and each day another part; all of them: ``python tests/faults/table.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from drawn import one_in
from fault_proxy import Fault
from matrix import FAULTS, STEP, Cell, Matrix


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    with Matrix(tmp_path_factory.mktemp("faults")) as found:
        yield found


FEW = [Fault.KILL_DEVICE, Fault.KILL_SERVER, Fault.CUT_LINK, Fault.CORRUPT, Fault.FULL_DISK]


def check(cells: Sequence[Cell]) -> None:
    assert cells
    assert not {str(cell.case): cell.outcome.wrong for cell in cells if cell.outcome.wrong}
    assert sum(cell.outcome.steps_lost + cell.outcome.steps_doubled for cell in cells) == 0


@pytest.mark.slow
def test_faults_at_each_kind_of_boundary_change_no_bit(whole: Matrix) -> None:
    """Each kind with one or two of five faults; others, and not only at the first boundary of a kind, below."""
    check(list(whole.run([case for nth, fault in enumerate(FEW) for case in one_in(4, whole.cases(fault), nth)])))


@pytest.fixture(scope="module")
def bottleneck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    """Of a kind of which the server keeps a part: activated, over int8."""
    with Matrix(tmp_path_factory.mktemp("faults-bottleneck"), run="bottleneck") as found:
        yield found


@pytest.mark.slow
def test_a_killed_server_changes_no_bit_of_bottlenecks(bottleneck: Matrix) -> None:
    """Nor where the server is being set up."""
    cases = bottleneck.cases(Fault.KILL_SERVER)
    assert {case.place for case in cases} >= {
        "adapter_state", "make_adapter_state", "embeddings, setting up", "group_parameters", "saved adapter",
    }  # fmt: skip
    check(list(bottleneck.run(one_in(4, cases))))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("run", ["bottleneck", "ffa", "passes", "kept-reads"])
def test_faults_change_no_bit_of_the_kinds_that_the_server_keeps_a_part_of(
    tmp_path_factory: pytest.TempPathFactory, run: str
) -> None:
    with Matrix(tmp_path_factory.mktemp(f"faults-{run}"), run=run) as found:
        said = Counter(boundary.name for boundary in found.reference.boundaries(STEP))
        assert (said["group_delta"] > said["group_input"]) is (run == "kept-reads")  # some come unasked
        cases = [case for nth, fault in enumerate(FAULTS) for case in one_in(8, found.cases(fault), nth)]
        check(list(found.run(cases)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.lower())
def test_each_fault_changes_no_bit_wherever_it_comes(whole: Matrix, fault: Fault) -> None:
    check(list(whole.run(one_in(8, whole.cases(fault, thorough=True)))))


def test_reference_step_has_all_message_kinds(whole: Matrix) -> None:
    """All kinds of messages are in it, and units are killed and revived around it."""
    kinds = {case.place for case in whole.cases(Fault.CUT_LINK)}
    assert kinds >= {
        "embeddings", "group_input", "group_delta", "labelled_hidden_states", "grad_hidden_states", "group_grad",
        "group_input_grad", "step_report", "signal", "checkpoint",
    }  # fmt: skip
    rows = (whole.reference.out / "metrics.jsonl").read_text().splitlines()
    assert len({row.split('"units":')[1] for row in rows}) > 2
