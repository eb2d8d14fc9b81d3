"""Faults of real processes, machines and links in the middle of a run: it goes on, and nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedzo.commands import doctor
from fedzo.commands.replay import replay_run
from fedzo.runtime.net.daemons import NODE_LEASE_S

CLOCK = Path(__file__).with_name("toy_clock.py")
STOPPED = 130  # the exit status of a run that somebody ended


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_sites_that_freeze_die_come_late_or_never_answer_do_not_stop_a_run(
    federation: Callable[..., Any],
) -> None:
    """Every reply proves by a hash of the trained values that its site holds the server's model."""
    at = federation(4)
    for site in at.sites:
        site.start()
    training = at.train("run", "fl.num_clients=4", "fl.rounds=1000", "strategy.deadline_s=10")
    at.wait_for_round("run", 2)

    # --- one is connected and says nothing, not even to the greeting: nobody waits for it
    at.sites[3].end()
    at.sites[3].start(answers=False)
    mute = at.wait_for_attendance("run", [0, 1, 2])
    at.wait_for_round("run", mute + 6)
    assert max(at.round_seconds("run")[mute + 1 :]) < 10

    # --- its executor comes at last, with nothing: it is helped over all rounds so far
    at.sites[3].end()
    at.sites[3].start()
    at.wait_for_attendance("run", [0, 1, 2, 3])

    # --- one freezes past the deadline, which is waited for once; later it is there again, and what it answers late is
    # not taken
    at.sites[1].freeze()
    missing = at.wait_for_attendance("run", [0, 2, 3])
    at.wait_for_round("run", missing + 12)
    assert max(at.round_seconds("run")[missing + 1 :]) < 10
    why = f"no reply since round {missing}; it is asked again once it registers"
    assert at.reason("run", 1, missing + 2) == why
    at.sites[1].thaw()
    at.wait_for_attendance("run", [0, 1, 2, 3])

    # --- an executor is killed at work and started again
    at.sites[2].signal(signal.SIGKILL, "executor")
    killed = len(at.rounds("run"))
    at.wait_for_round("run", killed + 1)
    at.wait_for_attendance("run", [0, 1, 2, 3])

    # --- a SuperNode is killed with a round under way: it has the message, and its executor has not answered
    before = at.sites[2].pids
    at.sites[2].signal(signal.SIGSTOP, "executor")
    time.sleep(3)  # what was answered before is done with: the round waits for this site alone
    under_way = len(at.rounds("run"))
    at.sites[2].signal(signal.SIGKILL, "supernode")
    at.sites[2].signal(signal.SIGCONT, "executor")
    assert at.wait_for_round("run", under_way + 1)[under_way]["attendance"] == [0, 1, 3]
    at.wait_for_attendance("run", [0, 1, 2, 3])
    after = at.sites[2].pids
    assert after["supernode"] != before["supernode"]
    assert after["executor"] == before["executor"]

    # --- one is away for twenty rounds
    at.sites[0].end()
    away = at.wait_for_attendance("run", [1, 2, 3])
    at.wait_for_round("run", away + 20)
    at.sites[0].start()
    at.wait_for_attendance("run", [0, 1, 2, 3])

    assert at.fedzo("stop", str(at.folder / "run"), output="stop").wait(120) == 0
    assert training.wait(120) == STOPPED
    assert at.rounds("run")[-1]["attendance"] == [0, 1, 2, 3]
    assert replay_run(at.folder / "run")["rounds"] == len(at.rounds("run"))


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_third_of_the_sites_away_at_random_loses_no_round_and_no_site(federation: Callable[..., Any]) -> None:
    """Frozen for as long as their round takes, each with a chance of 0.3; who is thawed attends again."""
    at, chance = federation(4), random.Random(30)
    for site in at.sites:
        site.start()
    training = at.train("run", "fl.num_clients=4", "fl.rounds=1000", "strategy.deadline_s=8")
    at.wait_for_round("run", 2)
    away_at: list[tuple[int, list[int]]] = []
    while len(away_at) < 15:
        away = [index for index in range(4) if chance.random() < 0.3]
        if not 0 < len(away) < 4:
            continue
        for index in away:
            at.sites[index].freeze()
        away_at.append((len(at.rounds("run")) + 1, away))
        lines = at.wait_for_round("run", len(at.rounds("run")) + 2)
        assert not set(lines[-1]["attendance"]) & set(away)
        assert lines[-1]["attendance"]
        for index in away:
            at.sites[index].thaw()
    at.wait_for_attendance("run", [0, 1, 2, 3])

    assert at.fedzo("stop", str(at.folder / "run"), output="stop").wait(120) == 0
    assert training.wait(120) == STOPPED
    share = 1 - sum(len(line["attendance"]) for line in at.rounds("run")) / (4 * len(at.rounds("run")))
    assert 0.2 < share < 0.8, (share, away_at)
    assert replay_run(at.folder / "run")["rounds"] == len(at.rounds("run"))


@pytest.mark.net
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("ahead_s", "side"), [(3600.0, "ahead of"), (-3600.0, "behind")])
def test_a_site_whose_clock_is_an_hour_off_is_refused_and_named_at_both_ends(
    federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, ahead_s: float, side: str
) -> None:
    at = federation(1, prefix={0: [sys.executable, str(CLOCK), str(ahead_s)]})
    at.sites[0].start(answers=False)

    log = at.folder / "logs" / "superlink.log"
    at.wait_for(lambda: f"client site-0 at 127.0.0.1: its clock is 3600 s {side} this server's" in log.read_text())
    seconds = r"360\d" if ahead_s > 0 else r"3(59\d|600)"  # the server tells whole seconds
    refused = re.compile(rf"the server refused: this machine's clock is {seconds} s {side} the server's\. One of")
    at.wait_for(lambda: refused.search(at.sites[0].said("supernode")))
    assert "connected as node" not in at.sites[0].said("supernode")

    assert dict(told[:2] for told in doctor.folder_checks(at.sites[0].folder.path))["clock"]
    now = time.time
    monkeypatch.setattr(doctor.time, "time", lambda: now() + ahead_s)
    (clock,) = [told for told in doctor.folder_checks(at.sites[0].folder.path) if told[0] == "clock"]
    assert not clock[1]
    assert re.match(rf"{seconds} s off the server's\. One of the two clocks is wrong", clock[2])


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_full_disk_at_the_server_ends_the_run_and_loses_nothing(federation: Callable[..., Any]) -> None:
    at = federation(2)
    for site in at.sites:
        site.start()
    with _small_disk(at.folder / "run", megabytes=4) as disk:
        training = at.train("run", "fl.num_clients=2", "fl.rounds=30", "strategy.deadline_s=30")
        done = len(at.wait_for_round("run", 3))
        ballast = disk / "ballast"
        _fill(ballast)

        assert training.wait(120) == 1
        kept = at.rounds("run")
        assert done <= len(kept) < 30
        assert "Is its disk full? Make room, and continue with `fedzo resume" in at.said("run")

        ballast.unlink()
        assert at.fedzo("resume", str(at.folder / "run"), output="resume").wait(120) == 0, at.said("resume")
        assert at.rounds("run")[: len(kept)] == kept
        assert replay_run(at.folder / "run")["rounds"] == 30


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_full_disk_under_the_superlink_is_told_and_the_run_waits_or_goes_on_later(
    federation: Callable[..., Any], tmp_path: Path
) -> None:
    with _small_disk(tmp_path / "server", megabytes=32) as disk:
        at = federation(2)
        for site in at.sites:
            site.start()
        # executor and SuperNode ask again after up to 20 s each, so there must be time for them after the disk has room
        training = at.train("run", "fl.num_clients=2", "fl.rounds=1000", "strategy.deadline_s=120")
        at.wait_for_round("run", 3)
        ballast, full = disk / "ballast", f"The disk of {disk} is full"

        # --- full for a moment: the run says so and waits, and both sites are in it again
        _fill(ballast)
        at.wait_for(lambda: full in at.said("run"))
        waits = -1
        while waits < len(at.rounds("run")):  # some rounds find room in the files that are there
            waits = len(at.rounds("run"))
            time.sleep(8)
        assert training.poll() is None
        ballast.unlink()
        at.wait_for_round("run", waits + 2)
        at.wait_for_attendance("run", [0, 1])

        # --- full for long: the run ends and says how to go on, which it does when there is room
        _fill(ballast)
        assert training.wait(300) == 1
        assert at.said("run").count(full) >= 2
        kept = at.rounds("run")
        ballast.unlink()
        resumed = at.fedzo("resume", str(at.folder / "run"), output="resume")
        at.wait_for(lambda: len(at.rounds("run")) > len(kept) + 2, what=lambda: at.said("resume"))
        assert resumed.poll() is None
        assert at.rounds("run")[: len(kept)] == kept
        assert at.fedzo("stop", str(at.folder / "run"), output="stop").wait(120) == 0
        assert resumed.wait(120) == STOPPED
        at.wait_for(lambda: at.rounds("run")[-1]["attendance"] == [0, 1])
        assert replay_run(at.folder / "run")["rounds"] == len(at.rounds("run"))


@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default:packets are not lost here")
def test_a_slow_and_flapping_link_costs_nobody_and_one_that_breaks_costs_a_site_its_rounds(
    federation: Callable[..., Any],
) -> None:
    with _other_host() as (namespace, device, host):
        at = federation(2, host=host, prefix={1: ["ip", "netns", "exec", namespace]})
        for site in at.sites:
            site.start()
        training = at.train("run", "fl.num_clients=2", "fl.rounds=1000", "strategy.deadline_s=15")
        at.wait_for_round("run", 2)

        # --- 2 kB/s, and then a link that breaks for a moment again and again: slower, and nobody is missed
        slow = len(at.rounds("run"))
        _ip("tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", "16kbit", "burst", "2kb", "limit", "3kb")
        at.wait_for_round("run", slow + 3)
        assert _counted(device, "overlimits") > 0
        _ip("tc", "qdisc", "del", "dev", device, "root")
        for _ in range(6):
            _ip("ip", "link", "set", device, "down")
            time.sleep(0.4)
            _ip("ip", "link", "set", device, "up")
            time.sleep(1.0)
        lines = at.wait_for_round("run", len(at.rounds("run")) + 1)
        assert [line["attendance"] for line in lines[slow:]] == [[0, 1]] * len(lines[slow:])

        # --- one packet of twenty is lost: slower, and nobody is missed
        if _lossy(device, "5%"):
            lossy = len(at.rounds("run"))
            lines = at.wait_for_round("run", lossy + 5)
            assert _counted(device, "dropped") > 0
            _ip("tc", "qdisc", "del", "dev", device, "root")
            assert [line["attendance"] for line in lines[lossy:]] == [[0, 1]] * len(lines[lossy:])

        # --- nothing passes for longer than a node is waited for; then it comes back by itself
        _ip("ip", "link", "set", device, "down")
        cut = at.wait_for_attendance("run", [0])
        at.wait_for_round("run", cut + 3)
        time.sleep(NODE_LEASE_S)
        _ip("ip", "link", "set", device, "up")
        at.wait_for_attendance("run", [0, 1])

        assert at.fedzo("stop", str(at.folder / "run"), output="stop").wait(120) == 0
        assert training.wait(120) == STOPPED
        assert replay_run(at.folder / "run")["rounds"] == len(at.rounds("run"))


@contextlib.contextmanager
def _small_disk(folder: Path, *, megabytes: int) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("needs a disk of its own, and mount is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(file: Path) -> None:
    """Write until the disk is full."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as out:
        while out.write(b"0" * 4096):
            pass


@contextlib.contextmanager
def _other_host() -> Iterator[tuple[str, str, str]]:
    """A network namespace that reaches this one by one link: its name, this end of the link, this end's address."""
    name, octet = f"fz{os.getpid()}", os.getpid() % 200 + 20
    try:
        _ip("ip", "netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a network namespace, and `ip netns add` is not allowed here")
    try:
        _ip("ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        _ip("ip", "addr", "add", f"10.77.{octet}.1/24", "dev", f"{name}a")
        _ip("ip", "link", "set", f"{name}a", "up")
        _ip("ip", "-n", name, "addr", "add", f"10.77.{octet}.2/24", "dev", f"{name}b")
        for device in ("lo", f"{name}b"):
            _ip("ip", "-n", name, "link", "set", device, "up")
        yield name, f"{name}a", f"10.77.{octet}.1"
    finally:
        _ip("ip", "netns", "del", name)


def _lossy(device: str, share: str) -> bool:
    """Lose a share of what this end of the link sends; not every kernel can (module ``sch_netem``)."""
    told = subprocess.run(
        ["tc", "qdisc", "add", "dev", device, "root", "netem", "loss", share],
        capture_output=True,
        text=True,
        check=False,
    )
    if told.returncode != 0:
        warnings.warn(f"packets are not lost here: this kernel has no netem ({told.stderr.strip()})", stacklevel=2)
    return told.returncode == 0


def _counted(device: str, what: str) -> int:
    """One of the counts of what a link's queue did."""
    told = subprocess.run(["tc", "-s", "qdisc", "show", "dev", device], capture_output=True, text=True, check=True)
    (count,) = re.findall(rf"{what} (\d+)", told.stdout)
    return int(count)


def _ip(*command: str) -> None:
    subprocess.run(command, check=True)
