"""Training checkpoints and models on disk: tensors and JSON, nothing that runs code on loading.

A checkpoint is one safetensors file. Its metadata hold the SHA-256 of the file, computed with zeros
instead of the digest itself. A model is a folder: config.json holds the configuration, in the
layout of transformers, and model.safetensors the weights, a digest of the same kind, and the
configuration once more, so that two files which do not belong together are found.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from deepopt._files import write_atomically

FORMAT = "deepopt.hope.checkpoint/2"
WITHOUT_DIGEST = "deepopt.hope.checkpoint/1"
NO_DIGEST = b"0" * 64
MODEL_TYPE = "deepopt_hope"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DIGEST_KEY = b'"sha256":"'  # in strings of the metadata the quotes are escaped


def save(path: Path, state: Any) -> None:
    """Write ``state`` so that ``path`` holds either all of it or what it held before.

    Args:
        path: the file; its directory exists.
        state: dicts (of string or int keys), lists, tuples, tensors, numbers, strings and None.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
        TypeError: ``state`` holds something else.
    """
    tensors: dict[str, Tensor] = {}
    packed = json.dumps(_pack(state, "", tensors))
    write_atomically(path, _signed(tensors, {"format": FORMAT, "state": packed}))


def load(path: Path) -> Any:
    """Return what :func:`save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, or a byte of it has changed.
    """
    content = path.read_bytes()
    if (intact := _is_intact(content)) is False:
        raise ValueError(f"{path} is damaged (it differs from its checksum); remove it")
    try:
        tensors = safetensors.torch.load(content)
        metadata = _metadata(content)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a checkpoint ({error}); remove it") from error
    if metadata.get("format") != (FORMAT if intact else WITHOUT_DIGEST):
        raise ValueError(f"{path} is not a checkpoint of this program (no format {FORMAT!r} in it)")
    return _unpack(json.loads(metadata["state"]), tensors)


def _signed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file with its own digest; the same tensors give the same bytes.

    The header is written here, because safetensors itself orders metadata differently from call to
    call.
    """
    content = safetensors.torch.save(tensors, metadata)
    old = _header(content)
    entries = json.loads(old)
    entries["__metadata__"] = {**metadata, "sha256": NO_DIGEST.decode()}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    content = b"".join([len(header).to_bytes(8, "little"), header, content[8 + len(old) :]])
    at = content.index(DIGEST_KEY) + len(DIGEST_KEY)
    digest = _digest(content, at)
    return content[:at] + digest + content[at + len(digest) :]


def _is_intact(content: bytes) -> bool | None:
    """Whether a file matches its digest; None for a file without one."""
    if DIGEST_KEY not in _header(content):
        return None
    at = content.index(DIGEST_KEY) + len(DIGEST_KEY)
    return content[at : at + len(NO_DIGEST)] == _digest(content, at)


def _metadata(content: bytes) -> dict[str, str]:
    found: dict[str, str] = json.loads(_header(content)).get("__metadata__", {})
    return found


def _header(content: bytes) -> bytes:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _digest(content: bytes, at: int) -> bytes:
    """The digest of a file, with zeros where the digest itself stands."""
    around = memoryview(content)
    digest = hashlib.sha256(around[:at])
    digest.update(NO_DIGEST)
    digest.update(around[at + len(NO_DIGEST) :])
    return digest.hexdigest().encode()


def save_model(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a model's configuration and weights into a folder, which is made.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = {str(x.dtype).removeprefix("torch.") for x in weights.values()}
    about: dict[str, Any] = {"model_type": MODEL_TYPE, "architectures": ["HopeForCausalLM"]}
    if len(dtypes) == 1:
        about["dtype"] = dtypes.pop()
    text = json.dumps({**about, **config}, indent=2) + "\n"
    tensors = {name: x.detach().cpu().clone().contiguous() for name, x in weights.items()}
    metadata = {"format": "pt", "config": json.dumps(config)}
    write_atomically(folder / CONFIG_FILE, text.encode())
    write_atomically(folder / WEIGHTS_FILE, _signed(tensors, metadata))


def load_model(folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save_model` wrote: the configuration and the weights by name.

    Weights without a digest, which other programs write, are not checked.

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: a file is damaged, the two do not belong together, the model is of another type,
            or its weights are pickles.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).is_file():
            continue
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
        if name == WEIGHTS_FILE and pickles:
            raise ValueError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can run any code: only "
                f"{WEIGHTS_FILE} is read; convert it where you trust it, by safetensors"
            )
        raise FileNotFoundError(
            f"{folder} has no {name}: give the folder that save_pretrained wrote, or the --out of "
            "a training run that has ended"
        )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        content = (folder / WEIGHTS_FILE).read_bytes()
        if _is_intact(content) is False:
            raise ValueError(f"{WEIGHTS_FILE} differs from its checksum")
        weights = safetensors.torch.load(content)
        written_with = json.loads(_metadata(content).get("config", "{}"))
    except (SafetensorError, ValueError, RecursionError) as error:  # deep nesting, the last
        raise ValueError(f"{folder} is damaged ({error}): write or copy it again") from error
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        found = config.get("model_type") if isinstance(config, dict) else config
        raise ValueError(f"{folder} has a model of type {found!r}: must be {MODEL_TYPE!r}")
    for name, value in written_with.items():
        if name not in config or config[name] != value:
            raise ValueError(
                f"{folder} has {name}={config.get(name)!r} in {CONFIG_FILE}, its weights were "
                f"written with {value!r}: the two files are not of one model; write or copy both "
                "again"
            )
    # Copied to memory that torch aligns: the rounding of a product can depend on the address.
    return config, {name: weight.to(device, copy=True) for name, weight in weights.items()}


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as JSON that tells dicts, lists and tuples apart; move its tensors to
    ``tensors``, by name.
    """
    if isinstance(value, Tensor):
        # Copied, because safetensors refuses tensors that share storage.
        name = f"{len(tensors)}:{name}"  # a path alone is not unique: keys may hold slashes
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        items = [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {name}, a {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
