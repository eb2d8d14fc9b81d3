"""Every decoder of bytes that come from elsewhere: good ones, damaged, are read or refused by an error of fedzo.

Damage is done to encodings that are right, so that it reaches what lies behind the first check. Each reading has a
bound of memory and of processor time. Lines of the logs are in ``records/test_decode.py``, masks in
``masks/test_mask.py``, HTTP in ``runtime/net/test_gate.py``.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import time
import tracemalloc
import warnings
import zipfile
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedzo.config.schema import LaunchConfig, RunConfig, RunSettings, SiteFile, filled
from fedzo.config.travel import from_json, to_json
from fedzo.data.config import TaskConfig
from fedzo.errors import ConfigError, FedzoError, OtherVersionError, ProtocolError, RunFolderError
from fedzo.evaluate import AnswersConfig, scores_of_peer
from fedzo.evaluate.answers import Answers
from fedzo.fl.artifact_transfer import receive
from fedzo.fl.config import FlConfig, StrategyConfig
from fedzo.fl.content import RECORD, SALT, SALT_BYTES
from fedzo.fl.limits import Limits
from fedzo.fl.messages import (
    ArtifactPiece,
    ArtifactReply,
    EvaluateReply,
    EvaluateRequest,
    Hello,
    HelloReply,
    ScalarReply,
    TrainRequest,
    VectorReply,
    decode,
    encode,
    scalars_to_bytes,
)
from fedzo.fl.server.registration import setup_of
from fedzo.fl.server.scalar_aggregator import check_reply
from fedzo.fl.server.vector_aggregator import VectorAggregator
from fedzo.fl.site_limits import SiteError
from fedzo.models.config import BaseConfig
from fedzo.records.decode import decode_json
from fedzo.records.decode import encode as plain
from fedzo.records.presence import ClientPresence, Presence
from fedzo.records.scores import PartialScore
from fedzo.records.texts import read_overrides
from fedzo.runtime.net.bundle import build_bundle, check_bundle
from fedzo.runtime.net.client_folder import ClientFolder, Invitation, read_invitation
from fedzo.runtime.net.credentials import (
    fingerprint,
    make_authority,
    make_key,
    pem_of,
    public_key_of,
    read_certificate,
    read_public_key,
)
from fedzo.runtime.net.server_folder import Listening, ServerFolder
from fedzo.trainers.artifacts import ArtifactStore
from fedzo.zo.directions import SHARED
from fedzo.zo.estimator import TwoPointConfig
from fedzo.zo.keys import OWN
from fedzo.zo.log import EMPTY_CHAIN, ScalarRecord, VectorRecord, pack, unpack
from fedzo.zo.server_optimizer import SgdConfig

MAX_BYTES, MAX_SECONDS = 48 << 20, 4.0
FLOATS = np.linspace(-1, 1, 6, dtype=np.float32)
PIECES = [
    *(b"\xff" * 4, b"\xff" * 8, b"\x7f" * 4, b"\0" * 8, b"\x80", b"9" * 25, b"9" * 5000, b"-1", b"1e999", b"0.5"),
    *(b"null", b"true", b"NaN", b"[" * 1200, b'{"a":' * 1200, b'"', b"\\ud800", b"\xed\xa0\x80", b"\n", b"A" * 4096),
]
"""What to put into bytes: lengths, numbers and depths without end, and words of JSON."""
METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
HUGE = [2**31, 2**63 - 1, -(2**63), 2**32, 65536, -1, 0, 1e308, -0.0, 5e-324, float("nan"), float("inf")]


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes in which something is turned over, cut off, left out, put in or doubled, up to three times."""
    data = good
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        to = draw(st.integers(at, min(len(data), at + 40)))
        new = draw(st.sampled_from(PIECES) | st.binary(max_size=8))
        how = draw(st.sampled_from(["turn", "cut", "leave out", "put in", "put over", "double"]))
        if how == "turn" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif how == "cut":
            data = data[:at]
        elif how == "leave out":
            data = data[:at] + data[to:]
        elif how == "put in":
            data = data[:at] + new + data[at:]
        elif how == "put over":
            data = data[:at] + new + data[at + len(new) :]
        else:
            data = data[:to] + data[at:to] * draw(st.integers(1, 3)) + data[to:]
    return data


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=9),
    st.sampled_from([10**4000, -1, 2**63, 1e308, "9" * 5000, "\ud800", [], {}, [[[]]], {"a": 1}, "1@2", "x@y"]),
)


@st.composite
def altered(draw: st.DrawFn, good: Any) -> bytes:
    """A text of JSON in which one value is another, is missing, is doubled under its name, or is far too deep."""
    root = {"": copy.deepcopy(good)}
    node, key = root, ""
    while isinstance(inner := node[key], dict | list) and inner and draw(st.integers(0, 3)):
        node, key = inner, draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
    how = draw(st.sampled_from(["exchange", "leave out", "add", "double", "deepen"]))
    mark = "so deep"
    if how == "leave out":
        del node[key]
    elif how == "add" and isinstance(node[key], dict):
        node[key][draw(st.text(max_size=5))] = draw(VALUES)
    elif how == "add" and isinstance(node[key], list):
        node[key] += [draw(VALUES)] * draw(st.sampled_from([1, 2, 5000]))
    else:
        node[key] = mark if how in ("deepen", "double") else draw(VALUES)
    text = json.dumps(root.get("", ""))
    if how == "deepen":
        opening, closing = draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
        depth = draw(st.sampled_from([3, 300, 900, 20_000]))
        text = text.replace(json.dumps(mark), opening * depth + "1" + closing * depth)
    if how == "double":
        name = json.dumps(key) if isinstance(key, str) else '"a"'
        text = text.replace(json.dumps(mark), f"{json.dumps(draw(VALUES))}, {name}: {json.dumps(draw(VALUES))}")
    return text.encode("utf-8", "surrogatepass")


@st.composite
def messages(draw: st.DrawFn, good: Any) -> RecordDict:
    """A message with fields that are missing, of another message, or hold something else."""
    fields = dict(encode(good)[RECORD]) | {SALT: bytes(SALT_BYTES)}  # the same in each draw
    names = [each.name for kind in (HelloReply, TrainRequest, ArtifactPiece) for each in dataclasses.fields(kind)]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(fields) or ["client"]) | st.sampled_from(names) | st.text(max_size=4))
        old = fields.pop(name, None)
        if draw(st.booleans()):
            continue
        if isinstance(old, bytes | str) and draw(st.booleans()):
            new = draw(damaged(old if isinstance(old, bytes) else old.encode()))
            fields[name] = new if isinstance(old, bytes) else new.decode("utf-8", "replace")
        else:
            whole = [each for each in HUGE if isinstance(each, float) or -(2**63) <= each < 2**63]
            lists = st.lists(st.sampled_from(whole[:5]), max_size=2)
            fields[name] = draw(st.sampled_from(whole) | st.text(max_size=9) | st.binary(max_size=9) | lists)
    return RecordDict({RECORD: ConfigRecord(fields)})


def record(**fields: Any) -> ScalarRecord:
    sound = {"round": 1, "lr": 0.05, "owners": (SHARED,), "coefficients": FLOATS.reshape(3, 2, 1), "directions": OWN}
    return ScalarRecord(**{**sound, **fields})


LIMITS = Limits(
    run=RunConfig(
        base=BaseConfig(label="opt", weights_digest="", tokenizer_digest="", architecture_digest=""),
        artifact="a" * 64,
        fl=FlConfig(num_clients=3, rounds=6, local_steps=3),
        estimator=TwoPointConfig(num_probes=2),
        server_optimizer=SgdConfig(lr=0.1),
    ),
    site=SiteFile(artifact_max_bytes=1 << 20),
)
OWNED = record(owners=(0, 2), coefficients=np.ones((1, 2, 2), np.float32), directions=4096)
LOG = pack([record(), OWNED, record(lr=0.0), VectorRecord.of(FLOATS, round=4, lr=0.5)])
TRAIN = TrainRequest(
    client=2, config_hash="c" * 64, space_id="a" * 64, round=3, from_round=1, log=pack([record(), record(round=2)]),
    chain=EMPTY_CHAIN.hex(), check=7, digest="d" * 64, steps=3, used=1, lr=0.05, max_abs_g=9.0,
)  # fmt: skip
SCALAR_REPLY = ScalarReply(
    position=3, g=scalars_to_bytes(FLOATS), loss=scalars_to_bytes(FLOATS), dropped=bytes(6), end_check=5
)
VECTOR_REPLY = VectorReply(position=3, change=scalars_to_bytes(FLOATS), loss=scalars_to_bytes(FLOATS[:3]))
HELLO_REPLY = HelloReply(
    num_train=9, num_heldout=3, num_train_cut=1, rows_digest="a" * 64, label_counts='{"0": 4, "1": 5}',
    config_hash="b" * 64, base_digest="c" * 64, tokenizer_digest="d" * 64, task_digest="e" * 64,
    architecture_digest="f" * 64, partition_digest="9" * 64,
)  # fmt: skip
CONTENT = b"0123456789" * 9
PIECE = ArtifactPiece(
    client=2, digest=hashlib.sha256(CONTENT).hexdigest(), size=len(CONTENT), offset=0, data=CONTENT,
    piece_digest=hashlib.sha256(CONTENT).hexdigest(),
)  # fmt: skip
SCORE = PartialScore("accuracy", 0.5, 0.7, 4, {0: (1, 2), 1: (1, 2)}, numbers={})
TASK = TaskConfig(candidates=[" bad", " good"])
RUN = json.loads(
    to_json(
        filled(LaunchConfig(task=TaskConfig(name="t", template="{text}", candidates=[" bad", " good"]))).run(
            BaseConfig(
                label="opt", weights_digest="ab" * 32, tokenizer_digest="ab" * 32, architecture_digest="ab" * 32
            ),
            artifact="ab" * 32,
        )
    )
)


def take_train(content: RecordDict) -> None:
    """A site's way to a request: what passes is within the run's limits."""
    request = decode(TrainRequest, content)
    LIMITS.check_client(request.client)
    LIMITS.check_steps(request)
    LIMITS.check_state(request)
    assert request.steps <= LIMITS.max_steps
    assert 0 <= request.lr <= 0.1 + 1e-6


def take_reply(content: RecordDict) -> None:
    """A server's way to a reply: what passes are numbers that can be averaged."""
    result = check_reply(decode(ScalarReply, content), TRAIN, probes=2, strategy=StrategyConfig(max_abs_g=10.0))
    assert result.g.shape == (3, 2)
    assert np.abs(result.g).max() <= 9.0


def take_vector(content: RecordDict) -> None:
    aggregator = VectorAggregator(6, RunSettings(strategy=StrategyConfig(max_abs_g=1e3)))
    result = aggregator.check(decode(VectorReply, content), dataclasses.replace(TRAIN, lr=0.05))
    assert np.isfinite(result.change).all()


def take_piece(content: RecordDict, folder: Path) -> None:
    """A site's way to a piece: it keeps nothing but the artifact, and nothing outside of its store."""
    piece = decode(ArtifactPiece, content)
    LIMITS.check_client(piece.client)
    LIMITS.check_artifact_size(piece.size)
    receive(piece, ArtifactStore(folder / "store"))
    assert [path.name for path in folder.iterdir()] == ["store"] or not piece.data


@st.composite
def in_pem(draw: st.DrawFn, good: bytes) -> bytes:
    """PEM whose wrapping or content is damaged."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(good))
    first, *lines, last = good.splitlines()
    return b"\n".join([first, b64encode(draw(damaged(b64decode(b"".join(lines))))), last, b""])


@st.composite
def in_zip(draw: st.DrawFn, good: bytes) -> bytes:
    """A bundle that is damaged, or whose files are."""
    if draw(st.booleans()):
        return draw(damaged(good))
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as archive, zipfile.ZipFile(out, "w", draw(st.sampled_from(METHODS))) as bad:
        names = archive.namelist()
        for name in [*names, draw(st.sampled_from(names))]:
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # that a name is there twice
                bad.writestr(name, draw(st.just(archive.read(name)) | damaged(archive.read(name))))
    return draw(st.just(out.getvalue()) | damaged(out.getvalue()))


def in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    def take(data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        return read(folder)

    return take


Decoder = tuple[st.SearchStrategy[Any], Callable[[Any, Path], object], tuple[type[FedzoError], ...]]


def decoders(made: Path) -> Iterator[tuple[str, Decoder]]:
    """Damaged encodings, what reads them, and the errors that may come of it, by name."""
    protocol, config = (ProtocolError,), (ConfigError,)
    for message in (
        *(Hello(client=1, config_hash="a" * 64), HELLO_REPLY, TRAIN, SCALAR_REPLY, VECTOR_REPLY, PIECE),
        *(EvaluateRequest(client=2, log=LOG), EvaluateReply(scores="{}"), ArtifactReply(intact=False)),
    ):
        kind = type(message)
        yield kind.__name__, (messages(message), lambda bad, _, kind=kind: decode(kind, bad), protocol)
    yield "steps", (messages(TRAIN), lambda bad, _: take_train(bad), (ProtocolError, SiteError))
    yield "scalars", (messages(SCALAR_REPLY), lambda bad, _: take_reply(bad), protocol)
    yield "vector", (messages(VECTOR_REPLY), lambda bad, _: take_vector(bad), protocol)
    yield "piece", (messages(PIECE), take_piece, (ProtocolError, SiteError))
    yield "log", (damaged(LOG), lambda bad, _: [each.to_bytes() for each in unpack(bad)], protocol)
    yield "bundle", (in_zip(build_bundle()), lambda bad, _: check_bundle(bad), (OtherVersionError,))
    counts = {"0": 4, "1": 5}

    def hello(field: str, bad: bytes) -> HelloReply:
        return HelloReply(**{field: bad.decode("utf-8", "replace")})

    yield "label counts", (altered(counts), lambda bad, _: setup_of(0, hello("label_counts", bad)), protocol)
    figures = {"rewrite.accepted": 4.0, "rewrite.gate share": 0.95}
    yield "stages", (altered(figures), lambda bad, _: setup_of(0, hello("stages", bad)), protocol)

    def scores(bad: bytes, _: Path) -> object:
        evaluators = {"answers": Answers(AnswersConfig())}
        return scores_of_peer(bad.decode("utf-8", "replace"), evaluators, TASK, max_examples=9)

    yield "scores", (altered({"answers": plain(SCORE)}), scores, protocol)
    yield "run", (altered(RUN), lambda bad, _: from_json(bad.decode("utf-8", "replace"), RunConfig), config)

    key, authority = make_key(made / "key"), made / "ca.crt"
    make_authority(authority, made / "ca.key")
    private, certificate = (made / "key").read_bytes(), authority.read_bytes()
    yield "certificate", (in_pem(certificate), in_file("crt", lambda at: read_certificate(at / "crt")), config)
    yield "private key", (in_pem(private), in_file("key", lambda at: public_key_of(at / "key")), config)
    kind, blob = key.encode().split()
    line = damaged(b64decode(blob)).map(lambda bad: kind + b" " + b64encode(bad)) | damaged(key.encode())
    yield "public key", (line, lambda bad, _: read_public_key(bad.decode("utf-8", "replace")), config)
    yield "key of a node", (in_pem(pem_of(key)), lambda bad, _: fingerprint(bad), ())

    invitation = plain(Invitation(address="h:1", authority=certificate.decode(), key=private.decode()))
    yield "invitation", (altered(invitation), in_file("i", lambda at: read_invitation(at / "i")), config)
    address = in_file("server.json", lambda at: ClientFolder(at).address)
    yield "client's server.json", (altered({"address": "h:1"}), address, config)
    listening = plain(Listening(address="h:1", listen="0.0.0.0:8443", control="127.0.0.1:8444"))
    listens = in_file("server.json", lambda at: ServerFolder(at).listening)
    yield "server.json", (altered(listening), listens, config)
    rows = [{"index": 0, "name": "a", "key": key, "added": "2026-01-01"}]
    registry = in_file("clients.json", lambda at: ServerFolder(at).registry.by_key())
    yield "clients.json", (altered(rows), registry, config)
    row = ClientPresence(client=0, state="ready", why="x", version="1", last_round=2)
    presence = plain(Presence(round=3, round_seconds=0.5, clients=(row,)))
    yield (
        "presence",
        (
            altered(presence),
            lambda bad, _: decode_json(Presence, bad, where="presence", error=RunFolderError),
            (RunFolderError,),
        ),
    )
    yield (
        "overrides",
        (
            damaged(b"- fl.rounds=3\n- model=tiny\n- a: &x [1, *x]\n"),
            in_file("overrides.yaml", read_overrides),
            (RunFolderError,),
        ),
    )


NAMES = [
    *("Hello", "HelloReply", "TrainRequest", "ScalarReply", "VectorReply", "ArtifactPiece", "EvaluateRequest"),
    *("EvaluateReply", "ArtifactReply", "steps", "scalars", "vector", "piece", "log", "bundle", "label counts"),
    "stages",
    *("scores", "run", "certificate", "private key", "public key", "key of a node", "invitation"),
    *("client's server.json", "server.json", "clients.json", "presence", "overrides"),
]


@pytest.fixture(scope="module")
def decoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Decoder]:
    table = dict(decoders(tmp_path_factory.mktemp("made")))
    assert sorted(NAMES) == sorted(table)
    return lambda name: table[name]


@pytest.mark.parametrize("name", NAMES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_bytes_are_read_or_refused_in_little_memory_and_time(
    name: str, decoder_of: Callable[[str], Decoder], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    strategy, read, errors = decoder_of(name)
    bad = data.draw(strategy)
    folder = tmp_path_factory.mktemp("bad")
    tracemalloc.start()
    begun = time.process_time()
    try:
        read(bad, folder)
    except errors as error:
        assert len(str(error)) < 4000  # noqa: PT017
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < MAX_BYTES + 10 * len(bad)
    assert time.process_time() - begun < MAX_SECONDS
