"""The mask and its file: round trips, one message for each way a file can be bad."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedzo.errors import ConfigError, RunFolderError
from fedzo.masks import Mask, Selector, check_fits, encode_mask, load_mask, save_mask, select_mask
from fedzo.testing.tiny_models import tiny_model

MANIFEST = {"selector": "sensitivity", "note": "caf\u00e9 \u2603"}
OLD_HEADER = (
    rb'{"__metadata__":{"fedzo_mask":"{\"format\":1,\"layout\":[[\"z.weight\",[2,3]],[\"a.weight\",[3,4]]],'
    rb"\"manifest\":{\"note\":\"caf\\u00e9 \\u2603\",\"selector\":\"sensitivity\"},"
    rb'\"sha256\":\"12214d8adde6c7c1742a7d71dd0206237c37decd93058a22525624c52199934d\"}"},'
    rb'"gradient/a.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    rb'"gradient/z.weight":{"dtype":"F32","shape":[3],"data_offsets":[4,16]},'
    rb'"index/a.weight":{"dtype":"I32","shape":[1],"data_offsets":[16,20]},'
    rb'"index/z.weight":{"dtype":"I32","shape":[3],"data_offsets":[20,32]}}  '
)
OLD = struct.pack("<Q", len(OLD_HEADER)) + OLD_HEADER + struct.pack("<4f4i", -0.5, 1.5, -2.0, 0.25, 11, 0, 3, 5)
"""What fedzo 0.1.0 wrote of ``make()``."""


def make(**changes: Any) -> Mask:
    """Names in an order that is not the alphabet's."""
    held: dict[str, Any] = {
        "indices": {"z.weight": torch.tensor([0, 3, 5]), "a.weight": torch.tensor([11])},
        "shapes": {"z.weight": (2, 3), "a.weight": (3, 4)},
        "gradient": {"z.weight": torch.tensor([1.5, -2.0, 0.25]), "a.weight": torch.tensor([-0.5])},
        "manifest": MANIFEST,
    }
    return Mask(**(held | changes))


def read(data: bytes, folder: Path) -> Mask:
    (folder / "mask").write_bytes(data)
    return load_mask(folder / "mask")


def told_by(data: bytes) -> str:
    """The text of a file's metadata."""
    (text,) = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"].values()
    return str(text)


def assert_equal(a: Mask, b: Mask, *, gradient: bool = True) -> None:
    assert list(a.indices) == list(b.indices)
    assert a.shapes == b.shapes
    assert a.manifest == b.manifest
    assert all(torch.equal(a.indices[name], b.indices[name]) for name in a.indices)
    if gradient:
        assert a.gradient is not None
        assert b.gradient is not None
        assert all(torch.equal(a.gradient[name], b.gradient[name]) for name in a.gradient)


def rewritten(data: bytes, *, resign: bool = True, **changes: Any) -> bytes:
    """A mask file with other metadata or tensors; its SHA-256 made good again, as an attacker could."""
    held = json.loads(told_by(data))
    tensors = changes.pop("tensors", load(data))
    held |= changes
    if resign:
        dump = {"sort_keys": True, "separators": (",", ":")}
        digest = hashlib.sha256(json.dumps([held["layout"], held["manifest"]], **dump).encode())
        for name in sorted(tensors):
            shape = list(tensors[name].shape)
            digest.update(json.dumps([name, str(tensors[name].dtype), shape], **dump).encode())
            digest.update(tensors[name].numpy().tobytes())
        held["sha256"] = digest.hexdigest()
    return save(tensors, metadata={"fedzo_mask": json.dumps(held)})


def in_place_of(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """The change of a file in which a tensor is another, or is there, too."""
    return {"tensors": load(encode_mask(make())) | {name: tensor}}


# --- round trips ------------------------------------------------------------------------------------------------------


def test_a_file_round_trip_keeps_everything_in_wire_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mask.safetensors"

    save_mask(make(), path)

    assert_equal(load_mask(path), make())
    assert [file.name for file in path.parent.iterdir()] == ["mask.safetensors"]


def test_a_selected_mask_round_trips(tmp_path: Path) -> None:
    mask = select_mask(tiny_model(), density=0.01, windows=[torch.arange(20), torch.arange(30, 50)])

    save_mask(mask, tmp_path / "mask")

    assert_equal(load_mask(tmp_path / "mask"), mask)


def test_a_file_of_an_earlier_version_reads_alike_and_is_written_alike(tmp_path: Path) -> None:
    save_mask(make(), tmp_path / "new")

    assert_equal(read(OLD, tmp_path), make())
    assert told_by((tmp_path / "new").read_bytes()) == told_by(OLD)


def test_a_mask_that_was_read_does_not_change_with_its_file(tmp_path: Path) -> None:
    mask = Mask({"experts": torch.tensor([7, 9])}, {"experts": (1 << 31,)}, {"experts": torch.ones(2)}, {})
    save_mask(mask, tmp_path / "mask")

    found = load_mask(tmp_path / "mask")
    with (tmp_path / "mask").open("r+b") as file:
        file.seek(-24, 2)  # two numbers of 64 bits and two of 32
        file.write(bytes(24))

    assert_equal(found, mask)


def test_clients_get_the_indices_without_the_gradient(tmp_path: Path) -> None:
    numel, k = 1_000_000, 1000
    big = Mask(
        indices={"w": torch.arange(k) * (numel // k)},
        shapes={"w": (1000, 1000)},
        gradient={"w": torch.ones(k)},
        manifest={},
    )

    received = read(encode_mask(big), tmp_path)

    assert received.gradient is None
    assert_equal(received, big, gradient=False)
    assert received.digest() == big.digest()
    assert 4 * k < len(encode_mask(big)) < 4 * k + 500


def test_indices_beyond_32_bits_are_kept(tmp_path: Path) -> None:
    high = 5_000_000_000
    mask = Mask(
        indices={"experts": torch.tensor([7, high])},
        shapes={"experts": (8, 1_000_000, 1000)},
        gradient=None,
        manifest={},
    )

    assert read(encode_mask(mask), tmp_path).indices["experts"].tolist() == [7, high]


def test_equal_masks_have_equal_bytes() -> None:
    other = make(manifest=dict(reversed(MANIFEST.items())))

    assert len({encode_mask(make()) for _ in range(5)} | {encode_mask(other)}) == 1


def test_saving_replaces_a_file_and_leaves_it_whole_when_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mask"
    save_mask(make(), path)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunFolderError, match=r"mask: it must be writable, got 'No space left on device'"):
        save_mask(make(manifest={}), path)
    monkeypatch.undo()

    assert_equal(load_mask(path), make())
    assert len(list(tmp_path.iterdir())) == 1
    save_mask(make(manifest={}), path)
    assert load_mask(path).manifest == {}


# --- digest -----------------------------------------------------------------------------------------------------------


def test_the_digest_is_that_of_names_shapes_and_indices_alone() -> None:
    digest = hashlib.sha256()
    for name, shape, indices in (("z.weight", [2, 3], [0, 3, 5]), ("a.weight", [3, 4], [11])):
        digest.update(json.dumps([name, shape, len(indices)], separators=(",", ":")).encode())
        digest.update(np.array(indices, dtype="<i8").tobytes())

    assert make().digest() == digest.hexdigest()
    assert make(gradient=None, manifest={}).digest() == digest.hexdigest()


def test_the_digest_changes_with_index_shape_name_and_order() -> None:
    base = make(gradient=None)
    z, a = base.indices["z.weight"], base.indices["a.weight"]
    others = [
        replace(base, indices={"z.weight": torch.tensor([0, 2, 5]), "a.weight": a}),
        replace(base, shapes={"z.weight": (3, 2), "a.weight": (3, 4)}),
        replace(base, indices={"y.weight": z, "a.weight": a}, shapes={"y.weight": (2, 3), "a.weight": (3, 4)}),
        replace(base, indices={"a.weight": a, "z.weight": z}, shapes={"a.weight": (3, 4), "z.weight": (2, 3)}),
    ]

    assert len({mask.digest() for mask in [base, *others]}) == 5


# --- bad masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ([0, 3, 6], r"indices of 'z\.weight' must lie in 0\.\.5, got 0\.\.6: out of range"),
        ([-1, 3, 5], r"indices of 'z\.weight' must lie in 0\.\.5, got -1\.\.5: out of range"),
        ([3, 0, 5], r"indices of 'z\.weight' must ascend without repeats"),
        ([0, 3, 3], r"indices of 'z\.weight' must ascend without repeats"),
    ],
)
def test_impossible_indices_are_refused_in_memory_and_in_a_signed_file(
    flat: list[int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(indices={"z.weight": torch.tensor(flat), "a.weight": torch.tensor([11])})

    tensors = load(encode_mask(make())) | {"index/z.weight": torch.tensor(flat, dtype=torch.int32)}
    with pytest.raises(ConfigError, match="mask file .*: mask: the " + message):
        read(rewritten(encode_mask(make()), tensors=tensors), tmp_path)


def test_a_mask_that_does_not_hold_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="must hold at least one weight"):
        make(indices={}, shapes={}, gradient=None)
    with pytest.raises(ConfigError, match=r"must be an int64 vector, got torch\.int32"):
        make(indices={"z.weight": torch.tensor([0], dtype=torch.int32), "a.weight": torch.tensor([1])})
    with pytest.raises(ConfigError, match="shapes must name the same tensors"):
        make(shapes={"a.weight": (3, 4), "z.weight": (2, 3)})
    with pytest.raises(ConfigError, match="gradient must name the same tensors"):
        make(gradient={"z.weight": torch.zeros(3)})
    with pytest.raises(ConfigError, match=r"gradient of 'z\.weight' must be float32 of shape \(3,\), got .*\(2,\)"):
        make(gradient={"z.weight": torch.zeros(2), "a.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"gradient of 'a\.weight' must be finite"):
        make(gradient={"z.weight": torch.zeros(3), "a.weight": torch.tensor([float("nan")])})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mask file .*absent: it must be readable, got 'No such file or directory'"):
        load_mask(tmp_path / "absent")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"PK\x03\x04" + bytes(100),
        save({"w": torch.zeros(3)}),
        save({"w": torch.zeros(3)}, metadata={"other": "{}"}),
        struct.pack("<Q", 8) + b"{nonsens",
        struct.pack("<Q", 2**62) + b"{}",
    ],
)
def test_a_file_that_is_not_a_mask_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mask").write_bytes(content)

    with pytest.raises(ConfigError, match=r"mask file .*: it must be a whole mask that fedzo wrote"):
        load_mask(tmp_path / "mask")


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", r"must be an object, got \[\]"), ("{}", "format must be .*, got nothing"), ("{", "must be JSON")],
)
def test_a_file_that_tells_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"mask file .*: {message}"):
        read(save({"w": torch.zeros(3)}, metadata={"fedzo_mask": text}), tmp_path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    save_mask(make(), tmp_path / "mask")
    data = (tmp_path / "mask").read_bytes()

    for length in range(9, len(data), 7):
        with pytest.raises(ConfigError, match=r"mask file .*: it must be a whole mask that fedzo wrote"):
            read(data[:length], tmp_path)


def test_a_flipped_bit_in_the_numbers_is_refused(tmp_path: Path) -> None:
    save_mask(make(), tmp_path / "mask")
    data = bytearray((tmp_path / "mask").read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]

    for at in range(start, len(data)):
        flipped = data.copy()
        flipped[at] ^= 1
        with pytest.raises(ConfigError, match="the content must match its SHA-256"):
            read(bytes(flipped), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"manifest": {"selector": "random"}}, "must match its SHA-256"),
        ({"layout": [["a.weight", [3, 4]], ["z.weight", [2, 3]]]}, "must match its SHA-256"),
        ({"sha256": "0" * 64}, "must match its SHA-256"),
    ],
)
def test_altered_metadata_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read(rewritten(encode_mask(make()), resign=False, **changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format must be 1, got 2"),
        ({"more": 1}, "more must be left out"),
        ({"layout": [["z.weight", [2, 3]]]}, "its tensors must be those of its layout"),
        ({"layout": [["z.weight", [2, 3]], ["z.weight", [2, 3]], ["a.weight", [3, 4]]]}, "those of its layout"),
        ({"layout": [["z.weight", [2, -3]], ["a.weight", [3, 4]]]}, r"layout\[0\]\[1\]\[1\] must be .*, got -3"),
        ({"layout": [["z.weight", 6], ["a.weight", [3, 4]]]}, r"layout\[0\]\[1\] must be a list of 0 to 64, got 6"),
        ({"layout": [["z.weight", [2**63]], ["a.weight", [3, 4]]]}, r"layout\[0\]\[1\]\[0\] must be .*, got 9223"),
        ({"layout": [["z.weight", [2**40] * 65], ["a.weight", [3, 4]]]}, r"layout\[0\]\[1\] must be a list of 0 to 64"),
        ({"manifest": {"selector": 1}}, r"manifest\['selector'\] must be text"),
        ({"tensors": {"index/z.weight": torch.zeros(3, dtype=torch.int32)}}, "those of its layout"),
        (in_place_of("index/z.weight", torch.zeros(3)), "those of its layout"),
        (in_place_of("index/z.weight", torch.zeros(3, dtype=torch.int16)), "those of its layout"),
        (in_place_of("index/a.weight", torch.zeros(1, 1, dtype=torch.int32)), "those of its layout"),
        (in_place_of("gradient/z.weight", torch.zeros(3)), "those of its layout"),
    ],
)
def test_a_signed_file_of_the_wrong_form_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read(rewritten(encode_mask(make()), **changes), tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        b'"dtype":"I32","shape":[' + b"1," * 64 + b"1]",  # more axes than torch computes with
        b'"dtype":"F8_E8M0","shape":[4]',  # which some torch does not know
    ],
    ids=["axes", "dtype"],
)
def test_a_tensor_of_no_mask_is_refused_before_it_is_made(entry: bytes, tmp_path: Path) -> None:
    header = OLD_HEADER.replace(b'"index/a.weight":{"dtype":"I32","shape":[1]', b'"index/a.weight":{' + entry)
    assert header != OLD_HEADER

    with pytest.raises(ConfigError, match="those of its layout"):
        read(struct.pack("<Q", len(header)) + header + OLD[-32:], tmp_path)


@given(data=st.data())
def test_damaged_bytes_give_a_config_error_or_the_same_mask(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    good = bytearray(encode_mask(make()))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))

    try:
        mask = read(bytes(good), tmp_path_factory.getbasetemp())
    except ConfigError:
        return
    assert mask.digest() == make().digest()


@given(data=st.data())
def test_a_signed_file_of_any_shapes_and_indices_is_a_sound_mask_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sizes = st.integers(-2, 9) | st.sampled_from([2**31, 2**40, 2**63, 10**400])
    layout = [[name, data.draw(st.lists(sizes, max_size=3))] for name in ("z.weight", "a.weight")]
    tensors = {}
    for name, _ in layout:
        dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
        ends = torch.iinfo(dtype)
        indices = st.lists(st.integers(-1, 9) | st.sampled_from([ends.min, ends.max]), max_size=4)
        tensors[f"index/{name}"] = torch.tensor(data.draw(indices), dtype=dtype)

    try:
        data_of_file = rewritten(encode_mask(make()), layout=layout, tensors=tensors)
        mask = read(data_of_file, tmp_path_factory.getbasetemp())
    except ConfigError:
        return
    for name, flat in mask.indices.items():
        assert flat.tolist() == sorted(set(flat.tolist()))
        assert 0 <= int(flat[0]) <= int(flat[-1]) < math.prod(mask.shapes[name])


# --- fit --------------------------------------------------------------------------------------------------------------


def test_a_mask_fits_the_model_that_it_was_made_for() -> None:
    mask = select_mask(tiny_model(), density=0.01, selector=Selector.magnitude)

    check_fits(mask, tiny_model(seed=1))


def test_a_mask_for_another_model_is_refused_naming_the_tensor() -> None:
    mask = select_mask(tiny_model(), density=0.01, selector=Selector.magnitude)
    name = "model.layers.0.self_attn.q_proj.weight"

    with pytest.raises(ConfigError, match=f"the model has no parameter '{name}'"):
        check_fits(mask, tiny_model("gpt2"))
    with pytest.raises(ConfigError, match=rf"'{name}' must have shape \(16, 64\), got \(32, 32\)"):
        check_fits(replace(mask, shapes={**mask.shapes, name: (16, 64)}), tiny_model())
