"""Checkpoints on disk: whole or not there, and refused if a byte of them is another one."""

import errno
import os

import pytest
import safetensors.torch
import torch

from deepopt.hope import files
from deepopt.hope.train import main
from tests.hope.runs import arguments, assert_same, saved_step, train, wrong


def test_checkpoint_keeps_types_and_shared_storage(tmp_path):
    whole = torch.arange(6.0).view(2, 3)
    state = {
        "views": {0: whole[0], 1: whole[1], "transposed": whole.t()},
        "narrow": [whole.bfloat16(), torch.zeros((), dtype=torch.int64), torch.zeros(0, 3)],
        "plain": (None, True, 1, 0.1, float("inf"), "text", [], {}, ()),
    }
    files.save(tmp_path / "c", state)
    assert_same(files.load(tmp_path / "c"), state)


def test_checkpoint_refuses_what_is_not_data(tmp_path):
    with pytest.raises(TypeError, match="cannot hold /a/0, a object"):
        files.save(tmp_path / "c", {"a": [object()]})
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_with_any_byte_changed_or_missing_is_refused(tmp_path):
    path = tmp_path / "c"
    files.save(path, {"a": torch.arange(3.0), "text": '"sha256":"', "b": {0: (1, None)}})
    whole = path.read_bytes()
    damaged = [whole[:end] for end in range(len(whole))] + [whole + b" "]
    for at, byte in enumerate(whole):
        for flipped in {byte ^ 1, byte ^ 32, byte ^ 128, 32} - {byte}:
            damaged.append(whole[:at] + bytes([flipped]) + whole[at + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged|not a checkpoint"):
            files.load(path)
    path.write_bytes(whole)
    assert files.load(path)["a"].tolist() == [0, 1, 2]


def test_a_damaged_checkpoint_does_not_resume(config, capsys):
    train(config)
    path = config.out / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert "is damaged (it differs from its checksum)" in wrong(
        arguments(config, "--resume"), capsys
    )


def test_nothing_to_resume_and_damaged_checkpoints_are_named(config, capsys):
    assert "holds no checkpoint" in wrong(arguments(config, "--resume"), capsys)
    config.out.mkdir()
    path = config.out / "checkpoint.safetensors"
    path.write_bytes(b"damaged")
    assert "is damaged or not a checkpoint" in wrong(arguments(config, "--resume"), capsys)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    assert "is not a checkpoint of this program" in wrong(arguments(config, "--resume"), capsys)


def test_a_checkpoint_from_before_the_checksum_loads(tmp_path):
    path = tmp_path / "c"
    files.save(path, {"a": torch.arange(3.0)})
    with safetensors.safe_open(path, "pt") as file:
        old = {"format": "deepopt.hope.checkpoint/1", "state": file.metadata()["state"]}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(safetensors.torch.save(tensors, old))
    assert_same(files.load(path), {"a": torch.arange(3.0)})


def test_full_disk_keeps_the_last_checkpoint(config, monkeypatch, capsys):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 6:  # the second checkpoint within the run, after its metrics
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(arguments(config)) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "--resume" in message
    assert saved_step(config.out) == 5
    assert not list(config.out.glob("*.tmp"))
    assert main(arguments(config, "--resume")) == 0
