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
    eventually(lambda: gate.changes == 1 and gate._computes is None)  # it waits for its device
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
    assert gate._computes is None


def test_while_who_has_a_graph_waits_for_its_device_others_begin() -> None:
    """Or a far device would keep the cores idle."""
    training = TrainingGate(ComputeGate())
    with training.computing(), training.waiting(), training.computing(), training.waiting(), training.computing():
        pass


def test_more_than_a_few_graphs_are_begun_only_when_none_has_come_back_for_a_while() -> None:
    now, order, count = [0.0], list[int](), FEW_GRAPHS + 3
    gate = ComputeGate(lambda: now[0])
    training = TrainingGate(gate)
    answered, answered_again = [[threading.Event() for _ in range(count)] for _ in range(2)]

    def train(number: int) -> None:
        with training.computing():
            order.append(number)
            for answers in (answered, answered_again):
                with training.waiting():
                    answers[number].wait(60)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(count)]
    for number, thread in enumerate(threads):
        thread.start()
        eventually(lambda number=number: len(order) + len(gate._turns) == number + 1 and gate._computes is None)

    def check_begun(graphs: int) -> None:
        time.sleep(5 * QUIET_S)  # whoever waits has looked at the clock
        assert order == list(range(graphs))

    check_begun(FEW_GRAPHS)
    now[0] = 0.9 * QUIET_S
    answered[0].set()
    eventually(lambda: gate._graph_computed == now[0])
    now[0] = 1.8 * QUIET_S
    check_begun(FEW_GRAPHS)
    with gate.computing():  # who does not train waits for nobody's clock, and need not make room for those that do
        assert not gate.is_wanted
    for each in (answered, answered_again):
        each[1].set()
    threads[1].join(60)
    check_begun(FEW_GRAPHS + 1)  # there was room for one
    now[0] = 3 * QUIET_S
    eventually(lambda: len(order) == count)
    for each in (*answered, *answered_again):
        each.set()
    for thread in threads:
        thread.join(60)
    assert order == list(range(count))
