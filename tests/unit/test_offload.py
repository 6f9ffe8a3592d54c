"""Decoders whose layers stream give the bits of those that stay, whatever the weights are and wherever they are."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decoders, offloaded
from helpers.tiny_configs import DENSE, MIXTURE

from tersor import models
from tersor.checkpoint.source import open_source
from tersor.errors import InputError, OutputError, TersorError, UnsupportedError
from tersor.formats import get_scheme
from tersor.models import DecoderConfig
from tersor.models.finite import first_not_finite
from tersor.models.load import described, weight_bytes
from tersor.models.random import random_decoder
from tersor.models.streamed import Offload, weights_of
from tersor.offload import disk, pinned


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of five layers."""
    return offloaded.KINDS["plain"](tmp_path_factory.mktemp("plain"))


def same(one: models.Decoder, other: models.Decoder) -> bool:
    """Whether texts get the same bits from two decoders, twice from the second one."""
    given = decoders.texts(one.config.vocabulary)
    wanted = decoders.logits(one, given)
    return all(torch.equal(a, b) for _ in range(2) for a, b in zip(wanted, decoders.logits(other, given), strict=True))


@pytest.mark.parametrize("kind", offloaded.KINDS)
def test_every_kind_of_weight_streams_and_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    path = offloaded.KINDS[kind](tmp_path)
    stays = models.load(path, "cpu", torch.float32)
    for directory in (None, tmp_path / "images"):
        streams = offloaded.loaded(path, 1, directory)
        assert streams.streamed is not None and streams.streamed.layers == (1, 2, 3, 4)
        assert same(stays, streams)
        assert streams.nbytes < stays.nbytes


@pytest.mark.parametrize("resident", range(offloaded.LAYERS + 1))
def test_any_number_of_layers_may_stay(resident: int, plain: Path) -> None:
    stays, streams = models.load(plain, "cpu", torch.float32), offloaded.loaded(plain, resident)
    assert same(stays, streams)
    count = 0 if streams.streamed is None else len(streams.streamed.layers)
    assert count == offloaded.LAYERS - resident


def test_layers_that_stream_lie_in_two_buffers_and_others_do_not(plain: Path) -> None:
    streams = offloaded.loaded(plain, 1)
    assert streams.streamed is not None
    places = [weights_of(layer)[0].data_ptr() for layer in streams.layers]
    assert places[1] == places[3] != places[2] == places[4] and len(set(places)) == 3
    image = streams.streamed.nbytes // 4
    assert streams.streamed.slot_bytes == 2 * image
    assert [offloaded.loaded(plain, stay).streamed.nbytes for stay in (0, 2, 3)] == [5 * image, 2 * image, 0]  # type: ignore[union-attr]
    assert streams.nbytes == models.load(plain, "cpu", torch.float32).nbytes - streams.streamed.nbytes + 2 * image


def test_norms_and_biases_stay_since_the_layer_ahead_reads_them(tmp_path: Path) -> None:
    streams = offloaded.loaded(offloaded.KINDS["uint4"](tmp_path), 0)
    held = [{id(tensor) for tensor in weights_of(layer)} for layer in streams.layers]
    for layer, weights in zip(streams.layers, held, strict=True):
        assert layer.attention.qkv.bias is not None  # type: ignore[union-attr]
        assert not {id(layer.norms[0].weight), id(layer.attention.qkv.bias)} & weights  # type: ignore[union-attr]
        assert len(weights) >= 8  # codes and scales of four products


def test_steps_that_nobody_reads_copy_nothing_where_layers_are_alike(tmp_path: Path) -> None:
    for kind, copies in (("fp6", 0), ("mixed", 10)):
        path = offloaded.KINDS[kind](tmp_path / kind)
        stays, streams = models.load(path, "cpu", torch.float32), offloaded.loaded(path, 0)
        streamed: Any = streams.streamed
        decoders.logits(streams, decoders.texts(96))
        load, seen = streamed._store.load, []
        with streamed.rehearsed():  # what slots lack is there from here on
            streamed._store.load = lambda *of, load=load, seen=seen: seen.append(of) or load(*of)
            decoders.whole(streams, decoders.texts(96)[0])
            decoders.whole(streams, decoders.texts(96)[0])
        assert len(seen) == copies, kind
        assert same(stays, streams)


def test_what_is_in_memory_of_the_host_is_as_much_as_a_step_copies(plain: Path) -> None:
    told: list[str] = []
    streams = offloaded.loaded(plain, 2, told=told.append)
    assert streams.streamed is not None
    size = f"{streams.streamed.nbytes / 1e9:.2f} GB a step"
    assert len(told) == 1 and told[0].startswith("offload: 2 of 5 layers stay on the device, 3 stream from pinned host")
    assert size in told[0] and streams.streamed.bandwidth() > 0


def test_a_step_that_fails_in_the_middle_leaves_the_next_one_right(plain: Path, tmp_path: Path) -> None:
    stays = models.load(plain, "cpu", torch.float32)
    for directory in (None, tmp_path):
        streams = offloaded.loaded(plain, 1, directory)
        layers = streams.layers

        def fails(*arguments: Any) -> Any:
            raise RuntimeError("out of luck")

        for index in range(offloaded.LAYERS):
            streams.layers = (*layers[:index], fails, *layers[index + 1 :])  # type: ignore[assignment]
            with pytest.raises((RuntimeError, AttributeError)):
                decoders.logits(streams, decoders.texts(96))
            streams.layers = layers
            assert same(stays, streams)


def test_the_first_part_that_is_not_finite_is_found_in_a_layer_that_streams(plain: Path) -> None:
    streams = offloaded.loaded(plain, 1)
    assert first_not_finite(streams, [1, 2, 3]) == ""
    images: Any = streams.streamed
    image = images._store._images[2]  # of layer 3, whose first tensor is that of queries, keys and values
    image[:4].view(torch.float32).fill_(float("inf"))
    assert first_not_finite(streams, [1, 2, 3]).startswith(", first in model.layers.3.self_attn.q_proj or k_proj")


def test_bytes_of_layers_are_known_before_any_is_read(tmp_path: Path) -> None:
    # The first word of every row of a pruned weight is counted here, and rows are short.
    for kind, near in (("plain", 0.03), ("fp6", 0.03), ("sparse", 0.3), ("mixed experts", 0.03)):
        path = offloaded.KINDS[kind](tmp_path / kind)
        with open_source(path) as source:
            config, names, _, schemes = described(source)
            layers, outside = weight_bytes(source, config, names, schemes, torch.float32)
        decoder = models.load(path, "cpu", torch.float32)
        found = [sum(tensor.nbytes for tensor in layer.tensors()) for layer in decoder.layers]
        assert layers == pytest.approx(found, rel=near), kind
        assert outside == pytest.approx(decoder.nbytes - sum(found), rel=0.01), kind


def test_more_layers_than_there_are_cannot_stay(plain: Path) -> None:
    with pytest.raises(InputError, match="resident_layers is 6, and the model has 5 layers"):
        offloaded.loaded(plain, 6)


def test_a_host_with_too_little_memory_is_said_before_anything_is_read(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned, "available", lambda: 1000)
    monkeypatch.setattr(models.load.__globals__["Reading"], "read", lambda *_: pytest.fail("something was read"))
    with pytest.raises(
        TersorError, match=r"GB of pinned host memory are needed, and 0.0 GB are free: keep more layers"
    ):
        offloaded.loaded(plain, 0)


def test_a_disk_with_too_little_room_is_said_before_anything_is_read(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class State:
        f_bavail, f_frsize = 10, 512

    monkeypatch.setattr(disk.os, "statvfs", lambda path: State)
    monkeypatch.setattr(models.load.__globals__["Reading"], "read", lambda *_: pytest.fail("something was read"))
    with pytest.raises(OutputError, match=r"are to be written to .*images, and its disk has 0.0 GB left"):
        offloaded.loaded(plain, 0, tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_a_disk_that_fills_meanwhile_is_one_line_and_leaves_nothing(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "pwrite", full)
    with pytest.raises(OutputError, match=r"the disk is full behind 0\.0 GB of weights") as caught:
        offloaded.loaded(plain, 0, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_directory_where_nothing_can_be_made_is_one_line(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"no file can be made in .*file: "):
        offloaded.loaded(plain, 0, tmp_path / "file")


def test_the_file_has_no_name_while_it_is_read_and_is_closed_with_the_model(plain: Path, tmp_path: Path) -> None:
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    streams: Any = offloaded.loaded(plain, 0, tmp_path)
    assert not list(tmp_path.iterdir()) and len(os.listdir("/proc/self/fd")) > len(before)
    assert streams.streamed.bandwidth() > 0
    decoders.logits(streams, decoders.texts(96))
    del streams
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("sparsity", [None, 0.5])
@pytest.mark.parametrize("scheme", ["fp6_e3m2", None])
def test_random_decoders_stream_as_well(sparsity: float | None, scheme: str | None) -> None:
    def made(offload: Offload | None) -> models.Decoder:
        config = {**DENSE, "num_hidden_layers": 4}
        format = None if scheme is None else get_scheme(scheme)
        return random_decoder(
            DecoderConfig.from_dict(config), format, "cpu", torch.float32, sparsity=sparsity, offload=offload
        )

    streams = made(Offload(lambda layers, outside: 1))
    assert streams.streamed is not None and streams.streamed.layers == (1, 2, 3)
    assert same(made(None), streams)


def test_random_weights_are_pruned_by_as_much_as_is_asked_for() -> None:
    decoder = random_decoder(DecoderConfig.from_dict(DENSE), None, "cpu", torch.float32, sparsity=0.75)
    weight: Any = decoder.layers[0].ffn.down.weight  # type: ignore[union-attr]
    assert weight.form.nonzeros / (weight.shape[0] * weight.shape[1]) == pytest.approx(0.25, abs=0.02)
    with pytest.raises(UnsupportedError, match="pruned experts are not served"):
        random_decoder(DecoderConfig.from_dict(MIXTURE), None, "cpu", torch.float32, sparsity=0.5)
