"""The safetensors files of a model's folder, read and written one tensor at a time.

    shards = Shards(Path("gemma-7b-it"))
    shards.read("model.norm.weight")

A whole 7B model in 32 bits takes more memory than many machines have; its largest tensor takes little.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submission.data.files import read_json, write_json
from submission.data.tables import some
from submission.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# safetensors' names of dtypes, as its format document lists them.
_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor on disk.

    Attributes:
        file: that holds it.
        shape: of the tensor.
        code: its dtype as safetensors names it, such as BF16.
    """

    file: Path
    shape: tuple[int, ...]
    code: str


class OtherTensors(UserError):
    """A folder's tensors have other names or shapes than those of the model that its config.json describes."""


class Shards:
    """The tensors of a model's folder.

    They are read as transformers reads them: from model.safetensors, else from the files of the index, else, which
    transformers does not, from all `*.safetensors` files. Releases hold others too, such as consolidated.safetensors.

    Args:
        folder: of a model.

    Attributes:
        tensors: what is on disk, by name.

    Raises:
        UserError: a file is damaged or missing, two files hold a tensor of the same name, or the dtype of one is not
            provided for.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        where = None if (folder / _SINGLE).is_file() else _read_index(folder / _INDEX)
        for file in _weight_files(folder, where):
            try:
                with safe_open(file, framework="pt") as content:
                    for name in content.keys():  # noqa: SIM118 - it cannot be iterated
                        if where is not None and where.get(name) != file.name:
                            continue
                        part = content.get_slice(name)
                        if name in self.tensors:
                            raise UserError(f"{file} and {self.tensors[name].file.name} both hold {name}")
                        self.tensors[name] = TensorInfo(file, tuple(part.get_shape()), part.get_dtype())
            except UserError:
                raise
            except Exception as error:  # the library has an exception of its own
                raise UserError(f"{file} cannot be read: {first_line(error)}") from error
        if absent := sorted(set(where or ()) - set(self.tensors)):
            raise UserError(f"{folder / _INDEX} lists {len(absent)} tensors that its files do not hold: {some(absent)}")
        if not self.tensors:
            raise UserError(f"{folder} holds no *.safetensors file")
        for name, info in self.tensors.items():
            if info.code not in _CODES.values():
                raise UserError(
                    f"{info.file} holds {name} in {info.code}, which is not provided for: name a folder with the "
                    "model's weights in 16 or 32 bits"
                )

    @property
    def files(self) -> list[Path]:
        """The files that hold a tensor."""
        return sorted({info.file for info in self.tensors.values()})

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored.

        Its memory is the file's own and is given back with the tensor: each read opens the file anew, because pages
        of an open file stay in memory.
        """
        from safetensors import safe_open

        with safe_open(self.tensors[name].file, framework="pt") as content:
            found: torch.Tensor = content.get_tensor(name)
        return found


def _read_index(path: Path) -> dict[str, str] | None:
    """The file of each tensor; None if there is no index.

    Raises:
        UserError: it is damaged.
    """
    if not path.is_file():
        return None
    content = read_json(path)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not (isinstance(where, dict) and where and all(isinstance(file, str) for file in where.values())):
        raise UserError(f"{path} is damaged: its weight_map must say which file holds each tensor")
    for file in sorted(set(where.values())):
        if Path(file).name != file or not (path.parent / file).is_file():
            raise UserError(f"{path} lists {file!r}, and its folder holds no such file")
    return where


def _weight_files(folder: Path, where: Mapping[str, str] | None) -> list[Path]:
    if where is not None:
        return [folder / file for file in sorted(set(where.values()))]
    single = folder / _SINGLE
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def write_shards(
    output: Path, base: Shards, dtypes: Mapping[str, torch.dtype], tensor: Callable[[str], torch.Tensor]
) -> None:
    """Write a model's tensors to files called as those of another model, with an index unless it is model.safetensors.

    Args:
        output: folder to write to.
        base: whose files tell names, shapes, and which tensor goes where.
        dtypes: of what is written, by name of tensor; what is not named is left out.
        tensor: its content, in that dtype.
    """
    where: dict[str, str] = {}
    for file in base.files:
        names = [name for name, info in base.tensors.items() if info.file == file and name in dtypes]
        # The largest elements first, so that all of them lie aligned.
        names.sort(key=lambda name: (-dtypes[name].itemsize, name))
        if names:
            _write(output / file.name, names, base, dtypes, tensor)
            where |= dict.fromkeys(names, file.name)
    if set(where.values()) != {_SINGLE}:
        total = sum(_bytes(base, name, dtypes[name]) for name in where)
        write_json(output / _INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def _bytes(base: Shards, name: str, dtype: torch.dtype) -> int:
    return dtype.itemsize * math.prod(base.tensors[name].shape)


def _write(
    path: Path,
    names: Sequence[str],
    base: Shards,
    dtypes: Mapping[str, torch.dtype],
    tensor: Callable[[str], torch.Tensor],
) -> None:
    """Write one file: eight bytes of length, a header in JSON, the tensors' bytes (github.com/huggingface/safetensors).

    The library's writer takes all tensors of a file at once, and a whole model may be one file.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + _bytes(base, name, dtypes[name])
        code = _CODES[str(dtypes[name]).removeprefix("torch.")]
        header[name] = {"dtype": code, "shape": list(base.tensors[name].shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little"))
        file.write(head)
        for name in names:
            content = tensor(name).contiguous()
            assert content.dtype == dtypes[name]
            assert tuple(content.shape) == base.tensors[name].shape
            file.write(content.reshape(-1).view(torch.uint8).numpy().data)


def check_tensors(
    shards: Shards, kept: Sequence[str], wanted: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse weights that are not those of the model that `config.json` describes.

    Args:
        shards: the weights.
        kept: names of theirs that count.
        wanted: names that the model needs.
        shapes: that the model's tensors have, by the names on disk.

    Raises:
        OtherTensors: names some.
    """
    other = [f"{name} (shape {shards.tensors[name].shape} instead of {shape})" for name, shape in shapes.items()
             if name in shards.tensors and shards.tensors[name].shape != shape]  # fmt: skip
    for what, names in (("lacks", set(wanted) - set(kept)),
                        ("has, and its configuration does not know,", set(kept) - set(wanted)),
                        ("has in other shapes", other)):  # fmt: skip
        if names:
            raise OtherTensors(
                f"model {shards.folder} {what} {len(names)} tensors: {some(sorted(names))}\n"
                "Its weights and its config.json do not go together, a file is missing, or transformers calls them "
                "otherwise than their files do, which is not provided for."
            )
