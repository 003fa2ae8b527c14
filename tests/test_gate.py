"""In which order micro-batches compute."""

import threading
import time
from collections.abc import Callable

from waiting import eventually

from dlora.cloud.exchange.gate import FEW_GRAPHS, QUIET_S, ComputeGate, TrainingGate


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


def test_more_than_a_few_graphs_are_begun_only_when_those_that_there_are_have_been_quiet() -> None:
    now, order = [0.0], list[int]()
    gate = ComputeGate(lambda: now[0])
    training = TrainingGate(gate)
    answered = [threading.Event() for _ in range(FEW_GRAPHS + 3)]

    def train(number: int) -> None:
        with training.computing():
            order.append(number)
            with training.waiting():
                answered[number].wait(60)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(len(answered))]
    for number, thread in enumerate(threads):
        thread.start()
        eventually(lambda number=number: len(order) + len(gate._turns) == number + 1 and not gate._is_taken)
    time.sleep(5 * QUIET_S)  # whoever waits has looked at the clock
    assert order == list(range(FEW_GRAPHS))
    now[0] = 1.01 * QUIET_S  # the graphs were quiet: one begins, and is one of those that are not quiet
    eventually(lambda: len(order) > FEW_GRAPHS)
    time.sleep(5 * QUIET_S)
    assert order == list(range(FEW_GRAPHS + 1))
    for number in range(2):  # with the second that ends there is room
        answered[number].set()
        threads[number].join(60)
    eventually(lambda: len(order) == FEW_GRAPHS + 2)
    with gate.computing():  # who does not train waits for nobody's clock
        pass
    assert order == list(range(FEW_GRAPHS + 2))
    for each in answered:
        each.set()
    for thread in threads:
        thread.join(60)
    assert order == list(range(FEW_GRAPHS + 3))
