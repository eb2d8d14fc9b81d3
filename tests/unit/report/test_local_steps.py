"""The figure of local steps: every panel holds the numbers of its client's signals, at their place in the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedzo.errors import RunFolderError
from fedzo.records.metrics import ClientRound, Round
from fedzo.report.figures import draw_figures
from fedzo.report.panels import MAX_PANELS, MAX_POINTS, Means, draw_client
from fedzo.report.run_data import RunData, load_run
from fedzo.report.style import BLUE, ORANGE

MakeRun = Callable[..., Path]
Records = list[dict[str, Any]]


def with_signals(records: Records, steps: Callable[[int, int], int], *, grad_ip: bool = True) -> Records:
    """g of a client's step is 10 k + r + t / 10; GradIP is minus three times that."""
    for record in (record for record in records if record["kind"] == "round"):
        record["clients"] = [c for c in record["clients"] if c["client"] not in record["absent"]]
        for client in record["clients"]:
            k, r = client["client"], record["round"]
            g = [10 * k + r + t / 10 for t in range(steps(k, r))]
            client["steps"] = len(g)
            client["signals"] |= {
                "abs_g": [None if (k, r) == (1, 4) else value for value in g],
                "grad_ip": [-3 * value if grad_ip and (k, r) != (1, 4) else None for value in g],
                "loss": [None] * len(g),
                "cosine": [None] * len(g),
            }
    return records


def many(one: dict[str, Any], number: int) -> Records:
    """As many clients as told, each like the one."""
    return [{**one, "client": k, "signals": dict(one["signals"])} for k in range(number)]


def figure_of(folder: Path) -> tuple[Figure, str]:
    (picture,) = (picture for picture in draw_figures(load_run(folder)) if picture.name == "local_steps")
    return picture.figure, picture.caption


def panels(figure: Figure) -> dict[str, Axes]:
    named = {axes.get_title(loc="left").splitlines()[0]: axes for axes in figure.axes if axes.lines}
    return {title.split(":")[0]: axes for title, axes in named.items()}


def line(axes: Axes, number: int) -> dict[float, float]:
    x, y = (np.asarray(values, float).tolist() for values in axes.lines[number].get_data())
    return dict(zip(x, y, strict=True))


def test_the_figures_of_local_steps_read_the_file_once(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    read, readings = RunData.with_signals, list[int]()

    def counted(run: RunData, clients: Collection[int] | None = None) -> Iterator[tuple[Round, list[ClientRound]]]:
        readings.append(1)
        return read(run, clients)

    monkeypatch.setattr(RunData, "with_signals", counted)

    assert {"local_steps", "local_losses"} <= {picture.name for picture in draw_figures(load_run(make_run()))}
    assert len(readings) == 1


def test_each_panel_holds_its_clients_steps_most_one_sided_first(make_run: MakeRun, lines: Records) -> None:
    # 2 is stopped early from round 1 on; round 0 has three steps, the others two
    records = with_signals(lines, lambda k, r: 3 if r == 0 else 1 if k == 2 else 2)
    figure, caption = figure_of(make_run("run", lines=records))

    found = panels(figure)
    assert list(found) == ["client 2", "client 0", "client 1"]
    assert found["client 2"].get_title(loc="left") == "client 2: 100 % great"
    starts = [0, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    thin = line(found["client 0"], 0)  # |GradIP| over the factor of three that it is larger by
    assert thin == pytest.approx({start + t: r + t / 10 for r, start in enumerate(starts) for t in range(3 - (r > 0))})
    stopped = line(found["client 2"], 0)
    assert np.isnan(stopped.pop(13.0))  # absent in round 6: a gap
    rounds = [r for r in range(1, 10) if r != 6]
    assert stopped == pytest.approx({0: 20, 1: 20.1, 2: 20.2, **{starts[r]: 20 + r for r in rounds}})
    # the steps of round 4 lost their losses; the mean goes over the two last steps
    mean = line(found["client 1"], 1)
    assert np.isnan(mean[9])
    assert np.isnan(mean[10])
    assert mean[13] == pytest.approx((15.1 + 16) / 2)
    assert "|GradIP|, divided by 3.00" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert "GradIP is g times a number" in caption


def test_colours_go_from_even_to_one_sided(make_run: MakeRun, lines: Records) -> None:
    figure, _ = figure_of(make_run("run", lines=with_signals(lines, lambda k, r: 2)))

    colour = {name: axes.lines[0].get_color() for name, axes in panels(figure).items()}
    hexes = {name: "#" + "".join(f"{round(255 * part):02x}" for part in rgba[:3]) for name, rgba in colour.items()}
    assert hexes == {"client 2": ORANGE, "client 0": ORANGE, "client 1": BLUE}
    bar = next(axes for axes in figure.axes if not axes.lines)
    assert bar.get_xlabel() == "share of the client's commonest label"


def test_flagged_clients_are_framed_with_their_statistics_and_the_compared_steps_are_shaded(
    make_run: MakeRun, lines: Records
) -> None:
    records = with_signals(lines, lambda k, r: 100 if r == 0 else 1 if k == 2 else 5)
    older = {
        "kind": "step_policy",
        "seconds": 7.0,
        "round": 1,
        "windows": None,
        "clients": [{"client": 0, "flagged": True, "steps": 1, "statistics": {}}],
        "fallback": False,
    }
    statistics = {"ratio": 6.31, "quiet": 0.85, "level": None, "cusum": 12.0}
    newest = {
        "kind": "step_policy",
        "seconds": 8.0,
        "round": 2,
        "windows": {"initial": [0, 20], "later": [80, 100]},
        "clients": [
            {"client": 0, "flagged": False, "steps": 5, "statistics": {"ratio": 1.1}},
            {"client": 2, "flagged": True, "steps": 1, "statistics": statistics},
        ],
        "fallback": False,
    }
    figure, caption = figure_of(make_run("run", lines=[*records, older, newest]))

    found = panels(figure)
    title = found["client 2"].get_title(loc="left")
    assert title == "client 2: 100 % great\nratio 6.31, quiet 0.85\ncusum 12"
    assert [text.get_text() for text in found["client 2"].texts] == ["stopped early:\nT_k = 1"]
    assert not found["client 0"].texts
    for axes in found.values():
        spans = [tuple(patch.get_extents().transformed(axes.transData.inverted()).intervalx) for patch in axes.patches]
        assert np.allclose(spans, [(0, 20), (80, 100)])
    assert "initial (0 to 20) and later (80 to 100)" in caption
    assert "Flagged (framed): 2." in caption

    same = [{**verdict, "steps": 8} for verdict in newest["clients"]]
    config = {"trainer": {}, "task": {}, "model": {}, "fl": {"num_clients": 3, "local_steps": 8}}
    folder = make_run("same", lines=[*records, {**newest, "clients": same}])
    (folder / "config.yaml").write_text(json.dumps(config))
    assert [text.get_text() for text in panels(figure_of(folder)[0])["client 2"].texts] == ["flagged:\nT_k = 8"]
    fallback, caption = figure_of(make_run("fallback", lines=[*records, {**newest, "fallback": True}]))
    assert [text.get_text() for text in panels(fallback)["client 2"].texts] == ["flagged:\nT_k = 1"]
    assert "Too many to stop any of them early." in caption


def test_of_many_clients_the_flagged_are_drawn_and_a_sequential_decision_has_its_place_in_time(
    make_run: MakeRun, lines: Records
) -> None:
    number = 2 * MAX_PANELS
    one = lines[0]["clients"][0]
    lines[0]["clients"] = [{**one, "client": k, "label_counts": {"0": 50 + k, "1": 50 - k}} for k in range(number)]
    for record in (record for record in lines if record["kind"] == "round"):
        record["clients"] = many(record["clients"][0], number)
    lines = with_signals(lines, lambda k, r: 2)

    def told(round_: int, flagged: set[int]) -> dict[str, Any]:
        clients = [
            {"client": k, "flagged": k in flagged, "steps": 1, "statistics": {"cusum": float(k)}} for k in range(number)
        ]
        told = {"kind": "step_policy", "seconds": 7.0, "round": round_, "windows": None}
        return {**told, "fallback": False, "clients": clients}

    figure, caption = figure_of(make_run("run", lines=[*lines, told(0, set()), told(3, {2}), told(7, {2, 5})]))

    found = panels(figure)
    assert len(found) == MAX_PANELS
    assert {"client 2", "client 5"} <= set(found)
    assert [float(found[f"client {k}"].lines[2].get_xdata()[0]) for k in (2, 5)] == [6.0, 14.0]  # two steps a round
    assert len(found[f"client {number - 1}"].lines) == 2
    assert found[f"client {number - 1}"].get_title(loc="left").endswith(f"cusum {number - 1}")
    assert "Flagged (framed, from the dashed line on): 2, 5." in caption


def test_the_losses_have_panels_of_their_own(make_run: MakeRun, lines: Records) -> None:
    records = with_signals(lines, lambda k, r: 1)
    assert "local_losses" not in [picture.name for picture in draw_figures(load_run(make_run("lost", lines=records)))]
    for record in (record for record in records if record["kind"] == "round"):
        for client in record["clients"]:
            client["signals"]["loss"] = [client["client"] + record["round"] / 100]
    pictures = {picture.name: picture for picture in draw_figures(load_run(make_run("run", lines=records)))}

    drawn = panels(pictures["local_losses"].figure)["client 1"]
    assert line(drawn, 0) == pytest.approx({r: 1 + r / 100 for r in range(10)})


def test_without_a_gradient_the_thin_line_is_g_itself(make_run: MakeRun, lines: Records) -> None:
    figure, caption = figure_of(make_run("run", lines=with_signals(lines, lambda k, r: 1, grad_ip=False)))

    assert line(panels(figure)["client 0"], 0) == {r: pytest.approx(r) for r in range(10)}
    assert "GradIP" not in caption + "".join(text.get_text() for text in figure.legends[0].get_texts())


def test_many_clients_and_steps_stay_small_and_the_panel_of_all_is_kept(make_run: MakeRun, lines: Records) -> None:
    one = lines[0]["clients"][1]
    lines[0]["clients"] = [
        {**one, "client": k, "label_counts": {"0": 50 + k, "1": 50 - k}} for k in range(2 * MAX_PANELS)
    ]
    for record in (record for record in lines if record["kind"] == "round"):
        record["clients"] = many(record["clients"][0], 2 * MAX_PANELS)
    folder = make_run("run", lines=with_signals(lines, lambda k, r: 100))
    figure, caption = figure_of(folder)

    found = panels(figure)
    assert len(found) == MAX_PANELS
    assert next(iter(found)) == f"client {2 * MAX_PANELS - 1}"
    assert list(found)[-1] == "client 0"
    assert all(len(drawn.get_xdata()) <= MAX_POINTS for axes in found.values() for drawn in axes.lines)
    x = line(found["client 0"], 0)
    assert np.mean(list(x.values())) == pytest.approx(
        np.mean([r + t / 10 for r in range(10) for t in range(100)]), 0.01
    )
    assert f"{MAX_PANELS} of {2 * MAX_PANELS} clients are shown" in caption
    assert "abs_g" in [picture.name for picture in draw_figures(load_run(folder))]


def test_the_lines_of_all_panels_are_means_of_equally_many_steps_and_the_legend_says_so(
    make_run: MakeRun, lines: Records
) -> None:
    """|g| goes 0, 2, 0, 2, ...; client 1 is stopped early and takes 120 of the 300 steps."""
    records = with_signals(lines, lambda k, r: 102 if r == 0 else 2 if k == 1 else 22, grad_ip=False)
    for record in (record for record in records if record["kind"] == "round"):
        for client in record["clients"]:
            client["signals"]["abs_g"] = client["signals"]["loss"] = [0.0, 2.0] * (client["steps"] // 2)
    pictures = {picture.name: picture for picture in draw_figures(load_run(make_run("run", lines=records)))}

    drawn = pictures["local_steps"].figure
    others, stopped = panels(drawn)["client 0"], panels(drawn)["client 1"]
    thin = line(others, 0)
    assert thin == {2 * block + 0.5: 1.0 for block in range(150)}
    starts = [102 + 22 * r for r in range(9)]
    assert line(stopped, 0) == {0.5 + step: 1.0 for step in (*range(0, 102, 2), *starts)}
    # 25 steps that end with a 2 hold thirteen of them
    thick = line(others, 1)
    assert (min(thick), max(thick)) == (1, 299)
    assert {round(value, 9) for step, value in thick.items() if step > 25} == {1.04}
    for name, told in (
        ("local_steps", ["|g|, mean of the last 25", "|g|, mean of up to 2 steps"]),
        ("local_losses", ["mean of the last 25", "loss of a batch, mean of up to 2 steps"]),
    ):
        assert [text.get_text() for text in pictures[name].figure.legends[0].get_texts()] == told


def test_a_loss_that_is_a_value_is_named_and_drawn_below_zero(make_run: MakeRun, lines: Records) -> None:
    records = with_signals(lines, lambda k, r: 1)
    for record in (record for record in records if record["kind"] == "round"):
        for client in record["clients"]:
            client["signals"]["loss"] = [-0.25 - record["round"] / 20]
    told = {}
    for loss in ("lm", "score"):
        run = load_run(make_run(loss, lines=records, task__loss=loss))
        told[loss] = {picture.name: picture for picture in draw_figures(run)}

    drawn = told["score"]["local_losses"]
    assert panels(drawn.figure)["client 0"].get_ylim() == pytest.approx((-1.1 * 0.7, 0.0))
    assert "A loss near 0" not in drawn.caption
    assert "A loss near 0" in told["lm"]["local_losses"].caption
    for loss, unit in (("lm", "nats"), ("score", "-accuracy")):
        assert told[loss]["local_losses"].figure.get_supylabel() == f"loss ({unit})"
        (axes,) = told[loss]["loss"].figure.axes
        assert axes.get_ylabel() == f"training loss ({unit})"


def test_a_client_whose_steps_lie_in_one_block_is_seen() -> None:
    axes = Figure().subplots()

    draw_client(axes, [20, 21], [1.0, 3.0], [1.0, 3.0], colour=BLUE, means=Means(2, 25))

    assert [(drawn.get_marker(), list(drawn.get_ydata())) for drawn in axes.lines] == [("o", [2.0]), ("o", [2.0])]


def test_a_class_name_stays_text_and_within_its_panel(make_run: MakeRun, lines: Records) -> None:
    records = with_signals(lines, lambda k, r: 1)
    for client in records[0]["clients"]:
        client["label_counts"] = {"<b>a very long name of a $class$": 5, "x": 1}
    figure, _ = figure_of(make_run("run", lines=records))

    assert panels(figure)["client 0"].get_title(loc="left") == "client 0: 83 % <b>a ver…"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"windows": {"initial": [0, "x"]}}, r"windows\['initial'\]\[1\] must be a whole number of .*, got 'x'"),
        ({"windows": {"initial": [0]}}, r"windows\['initial'\] must be \[a whole number of .*\], got \[0\]"),
        ({"windows": [0, 20]}, r"windows must be an object of 0 to 100 entries or null, got \[0, 20\]"),
        ({"clients": [{"client": 1, "steps": 1}]}, r"clients\[0\]\.flagged must be true or false, got nothing"),
    ],
)
def test_a_selection_that_is_none_is_refused(make_run: MakeRun, record: dict[str, Any], message: str) -> None:
    told = {"kind": "step_policy", "seconds": 1.0, "round": 1, "windows": None, "clients": [], "fallback": False}
    folder = make_run("run", lines=[{**told, **record}])

    with pytest.raises(RunFolderError, match=message):
        load_run(folder)


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ({"grad_ip": ["x"]}, r"clients\[1\]\.signals\.grad_ip\[0\] must be a float of .* or null, got 'x'"),
        ({"grad_ip": [1.0, 2.0]}, r"clients\[1\]\.signals must hold as many numbers in grad_ip, abs_g"),
    ],
)
def test_signals_that_are_no_numbers_are_refused(
    make_run: MakeRun, signals: dict[str, Any], message: str, lines: Records
) -> None:
    next(record for record in lines if record["kind"] == "round")["clients"][1]["signals"] |= signals

    with pytest.raises(RunFolderError, match=message):
        load_run(make_run("run", lines=lines))
