"""In which order micro-batches compute."""

import threading
from collections.abc import Callable

from waiting import eventually

from dlora.cloud.exchange.gate import ComputeGate, TrainingGate


def test_who_has_a_graph_goes_before_those_that_begin_one_and_all_others_keep_their_place() -> None:
    gate, order, answered = ComputeGate(), list[str](), threading.Event()
    training = TrainingGate(gate)

    def compute(own: ComputeGate | TrainingGate, name: str) -> None:
        with own.computing():
            order.append(name)

    def go_on() -> None:
        with training.computing():
            with training.waiting():
                answered.wait(60)
            order.append("goes on")

    threads = list[threading.Thread]()

    def start(function: Callable[..., None], *given: object) -> None:
        threads.append(threading.Thread(target=function, args=given))
        threads[-1].start()

    start(go_on)
    eventually(lambda: gate.changes == 1 and not gate._is_taken)  # it waits for its device
    with gate.computing():
        for number, (own, name) in enumerate([(training, "begins"), (gate, "answers"), (training, "begins, too")]):
            start(compute, own, name)
            eventually(lambda waiting=number + 1: len(gate._turns) == waiting)
        answered.set()
        eventually(lambda: len(gate._turns) == 4)
        start(compute, gate, "answers last")
        eventually(lambda: len(gate._turns) == 5)
    for thread in threads:
        thread.join(60)
    assert order == ["answers", "goes on", "begins", "begins, too", "answers last"]
    assert not gate._is_taken


def test_while_who_has_a_graph_waits_for_its_device_others_begin() -> None:
    """Or a far device would keep the cores idle."""
    training = TrainingGate(ComputeGate())
    with training.computing(), training.waiting(), training.computing(), training.waiting(), training.computing():
        pass
