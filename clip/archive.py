"""The weights inside OpenAI's files, which are TorchScript archives: programs that carry their weights.

We take the weights and leave the program alone. `ArchiveReader` knows the few things of which weights are
made, and refuses all others.
"""

if __name__ == "__main__":
    raise SystemExit("clip/archive.py is no command: python train.py reads it")

import pickle
import re
from collections import OrderedDict

import torch


class Module:
    """A module of the archive, with its attributes. `declared`: the names that its class lists as weights."""

    def __setstate__(self, attributes):
        self.attributes = attributes

    def tensors(self, prefix=""):
        """Parameters and buffers with their names, as `state_dict` gives them."""
        for name, value in self.attributes.items():
            if isinstance(value, Module):
                yield from value.tensors(f"{prefix}{name}.")
            # why: a script may keep other tensors, such as an attention mask
            elif name in self.declared and value is not None:
                yield prefix + name, value


class RebuildTensor:
    """A tensor from its place in a storage. why not a function: a pickle can set a function's attributes."""

    __slots__ = ()

    def __call__(self, storage, offset, size, stride, *_):
        return storage.as_strided(size, stride, offset)


class ArchiveReader(pickle.Unpickler):
    """Unpickles the module of a TorchScript archive: only what is listed in `known`, and no code of the file.

    archive: the open zip file. root: the folder in it that holds data.pkl, with "/" at its end.
    """

    known = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): RebuildTensor(),
        ("torch.jit._pickle", "build_intlist"): list,
        ("torch", "DoubleStorage"): torch.float64,
        ("torch", "FloatStorage"): torch.float32,
        ("torch", "HalfStorage"): torch.float16,
        ("torch", "BFloat16Storage"): torch.bfloat16,
        ("torch", "LongStorage"): torch.int64,
        ("torch", "IntStorage"): torch.int32,
    }

    def __init__(self, archive, root):
        super().__init__(archive.open(root + "data.pkl"))
        self.archive = archive
        self.root = root
        self.storages = {}

    def find_class(self, module, name):
        if module.split(".")[0] == "__torch__":
            return type(name, (Module,), {"declared": self.declared(module, name)})
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"{module}.{name} has no place among weights")
        return self.known[module, name]

    def declared(self, module, name):
        """The names that a class lists as parameters and buffers; its source is read as text."""
        source = self.archive.read(f"{self.root}code/{module.replace('.', '/')}.py").decode()
        lists = r"( +__parameters__ = .*\n)?( +__buffers__ = .*\n)?"
        head = re.search(rf"class {re.escape(name)}\(Module\):\n{lists}", source)[0]
        return re.findall(r'"(.+?)"', head)

    def persistent_load(self, key):
        _, dtype, number, _, _ = key
        if (dtype, number) not in self.storages:   # why kept: a file may name a storage again and again
            content = bytearray(self.archive.read(f"{self.root}data/{number}"))
            self.storages[dtype, number] = torch.frombuffer(content, dtype=dtype)
        return self.storages[dtype, number]
