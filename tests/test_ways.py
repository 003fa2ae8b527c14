"""What a step takes in each way to ask the adapters: the formula, what is said of it, and what ``auto`` takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from processes import run_edge
from proxy import recording_proxy
from runs import settings_in
from serving import config, random_dataset
from test_cli import assert_fails
from test_kind_commands import BOTTLENECK, place
from test_resume import Place
from tiny import TinyFactory

from dlora.edge.engine.bundle import Bundle
from dlora.edge.run import ways as ways_module
from dlora.edge.run.network import Measured
from dlora.edge.run.ways import WAYS, Way, advice, choose_passes, fastest, ways_of
from dlora.edge.settings import Placement, Settings
from dlora.edge.training.expected import mean_step_traffic
from dlora.edge.wire.connecting import ConnectSettings
from dlora.protocol.errors import UsageError
from dlora.protocol.manifest import load_manifest

__all__ = ["place"]

DELAY_S = 0.02
"""Each way."""
FAR = Measured(round_trip_s=0.08, bytes_per_s=1e6, server_s=1e-4, device_s=1e-5, window=8, runs_rows=True)


@pytest.fixture(scope="module")
def far(place: Place) -> Iterator[Place]:
    with recording_proxy(place.url, delay_s=DELAY_S) as proxy:
        yield Place(place.bundle, place.data, proxy.url)


def test_a_way_has_the_seconds_of_its_formula(tiny: TinyFactory) -> None:
    """Round trips and bytes by protocol.md, one micro-batch after the other or together; and rows that are computed."""
    manifest, dataset = load_manifest(tiny(blocks=4).bundle), random_dataset(90, examples=16)
    run = config(target_modules=("all-linear",), blocks=(2, 3), grad_accum=4, batch_size=2, window="1")
    groups = len(run.groups(manifest))
    live, one, _, two = ways_of(run, manifest, dataset, FAR)
    assert [live.round_trips, one.round_trips, two.round_trips] == [4 * (2 * groups + 1), 4 * 3, 4 * 5]
    for way in (live, two):
        run_so = msgspec.structs.replace(run, server=msgspec.structs.replace(run.server, passes=way.passes))
        traffic = mean_step_traffic(run_so, manifest, dataset)
        nbytes = traffic.bytes_up + traffic.bytes_down
        assert way.network_s == pytest.approx(0.08 * way.round_trips + nbytes / 1e6, abs=2e-3)
    tokens = 8 * dataset.tokens / len(dataset)
    assert live.server_s == pytest.approx(1e-4 * tokens * 1.5, abs=1e-3), "the upper half of the blocks twice"
    assert two.server_s == pytest.approx(1e-4 * tokens * 3, abs=1e-3)
    assert two.device_s == pytest.approx(3e-5 * 8 * dataset.labelled / len(dataset), abs=1e-3)
    run = msgspec.structs.replace(run, invocation=(7, 8))  # acts at some rows
    acting = 8 * dataset.acting_on_answers(run.invocation).mean_crossing_rows
    whole = ways_of(run, manifest, dataset, FAR._replace(runs_rows=False))
    assert acting < tokens
    assert whole[0].server_s == pytest.approx(1e-4 * (tokens + acting * 0.5), abs=1e-3)
    assert whole[3].server_s == pytest.approx(1e-4 * (tokens + 0.5 * (2 * tokens + 2 * acting)), abs=1e-3)
    run = msgspec.structs.replace(run, invocation=())
    together = msgspec.structs.replace(run, server=msgspec.structs.replace(run.server, window="auto"))
    assert [way.round_trips for way in ways_of(together, manifest, dataset, FAR)] == [2 * groups + 1, 3, 4, 5]
    two_at_a_time = [way.round_trips for way in ways_of(together, manifest, dataset, FAR._replace(window=2))]
    assert two_at_a_time == [2 * (2 * groups + 1), 6, 8, 10]


def way_of(passes: str, seconds: float, *, as_good: bool = True) -> Way:
    return Way(passes=passes, round_trips=5, mb=1.0, network_s=seconds, server_s=0.0, device_s=0.0, as_good=as_good)


def test_another_way_is_advised_where_it_takes_less_than_half() -> None:
    assert advice(way_of("3,3", 2.1), [way_of("live", 3.0), way_of("2,2", 1.0)], FAR) == (
        "the server is far (80 ms, 8 Mbit/s): a step takes about 2.1 s, 5 round trips; with --passes 2,2 about 1.0 s, "
        "5 round trips"
    )
    live = way_of("live", 2.1)
    assert advice(way_of("live", 1.9), [live, way_of("2,2", 1.0)], FAR) is None
    assert advice(live, [live, way_of("1,1", 1.0, as_good=False)], FAR) is None
    assert fastest([way_of("live", 1.0), way_of("2,2", 1.0)]).passes == "live", "the exact one, of two that are alike"


def test_plan_measures_a_server_that_is_named(far: Place) -> None:
    done = run_edge("plan", "--bundle", far.bundle, "--data", far.data, "--json", "--server", far.url, *BOTTLENECK)
    found = json.loads(done.stdout)
    assert [way["passes"] for way in found["ways"]] == list(WAYS)
    assert 2 * DELAY_S <= found["network"]["round_trip_s"] < 1
    assert all(found["network"][name] > 0 for name in ("bytes_per_s", "server_s", "device_s"))
    steps = {way["passes"]: way["step_s"] for way in found["ways"]}
    assert steps["live"] > steps["2,2"] > steps["1,1"]
    shown = run_edge("plan", "--bundle", far.bundle, "--data", far.data, "--server", far.url, *BOTTLENECK).stdout
    assert "a step with no blocks here, over this network (" in shown
    is_far = 2 * steps["2,2"] < steps["live"]
    assert is_far == (found["advice"] is not None)
    assert not is_far or "5 round trips" in found["advice"]
    without = run_edge("plan", "--bundle", far.bundle, "--data", far.data, "--json")
    assert "ways" not in json.loads(without.stdout)


def test_auto_takes_the_fastest_and_a_run_keeps_it(place: Place, far: Place, tmp_path: Path) -> None:
    done = run_edge(*far.train(tmp_path, *BOTTLENECK, "--passes", "auto", "--steps", 2))
    assert done.code == 0, done.stderr
    assert "how adapters are asked: --passes 2,2 (auto): about " in done.stderr
    assert settings_in(tmp_path).passes == "2,2"
    # Nearer now: what was chosen holds.
    more = [*place.train(tmp_path, *BOTTLENECK, "--passes", "auto", "--steps", 4), "--resume"]
    done = run_edge(*more)
    assert done.code == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["round_trips"] for row in rows] == [5] * 4


def test_auto_keeps_what_is_read_where_it_takes_passes(far: Place, tmp_path: Path) -> None:
    key, out = tmp_path / "key", tmp_path / "out"
    key.write_text("ab" * 32)
    done = run_edge(*far.train(out, *BOTTLENECK, "--passes", "auto", "--cache-key-file", key, "--steps", 8))
    assert done.code == 0, done.stderr
    assert "what adapters read in the base pass is kept, " in done.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["round_trips"] for row in rows[:4]] == [5] * 4
    assert 4 in [row["round_trips"] for row in rows[4:]]
    assert settings_in(out).cache_key_file == key


def test_auto_has_no_settings_of_a_cache_where_it_takes_live(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on would refuse them."""
    near = FAR._replace(round_trip_s=0.0, bytes_per_s=1e12)
    monkeypatch.setattr(ways_module, "measure_network", lambda *_: near)
    bundle, dataset = Bundle.open(tiny().bundle), random_dataset(90)
    run = config(kind="bottleneck")
    run = msgspec.structs.replace(run, placement=Placement(cache_mb=10.0, cache_key_file=Path("key")))
    chosen = choose_passes(run, bundle, dataset, ConnectSettings(), None, 0.0, is_asked=True, say=lambda _: None)
    assert chosen.server.passes == "live"
    assert chosen.placement == Placement()


def test_a_run_that_is_far_says_so(place: Place, far: Place, tmp_path: Path) -> None:
    for of, words in ((far, "the server is far ("), (place, "")):
        done = run_edge(*of.train(tmp_path / f"{bool(words)}", *BOTTLENECK, "--steps", 1))
        assert done.code == 0, done.stderr
        assert ("the server is far (" in done.stderr) is bool(words)
        assert ("with --passes 2,2 about " in done.stderr) is bool(words)


def test_a_server_that_cannot_be_measured_is_said(place: Place, tmp_path: Path) -> None:
    """And a plan is made without. What is fitted to one way of asking is not for a way that is still to be chosen."""
    planned = run_edge("plan", "--bundle", place.bundle, "--data", place.data, "--json", "--server", "127.0.0.1:9")
    assert planned.code == 0, planned.stderr
    assert "ways" not in json.loads(planned.stdout)
    assert "warning: network and server are not measured: cannot reach ws://127.0.0.1:9" in planned.stderr
    refused = run_edge(*place.train(tmp_path, *BOTTLENECK, "--passes", "auto", "--bytes-per-token", 900))
    assert_fails(refused, 2, "--bytes-per-token is for one way to ask the adapters")


def test_auto_is_for_the_command(tiny: TinyFactory) -> None:
    from dlora.edge.client.opening import resolve_settings

    settings = Settings.of(bundle="b", out="o", server="ws://x", passes="auto")
    with pytest.raises(UsageError, match="passes: auto is measured by dlora-edge train"):
        resolve_settings(settings, load_manifest(tiny().bundle), None, [])
    assert_fails(run_edge("plan", "--bundle", "b", "--data", "d", "--passes", "3"), 2, "--passes")
