"""Attacks on what a network is loaded from: weights, configurations, adapters."""
import io
import json
import pickle
import struct
from pathlib import Path

import torch

from tests.adversary.attack import Attack, digest, write
from tests.adversary.scene_attacks import in_place_of, removed, text_changed

WEIGHTS, CONFIG = "model/model.safetensors", "model/config.json"
ADAPTER, SETTINGS, ABOUT = "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/vggt_lora.json"


def make_base(folder: Path) -> Path:
    """Write a small network and an adapter for it."""
    from vggt_lora.adapters.adapter import apply_lora, save_adapter
    from vggt_lora.model.vggt import VGGT, VGGTConfig

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VGGT(VGGTConfig.golden()).eval()
    model.save_pretrained(folder / "model")
    adapted, _ = apply_lora(VGGT.from_pretrained(folder / "model"), "c", rank=2, dropout=0.0, seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    save_adapter(adapted, folder / "adapter")
    return folder


def tensors_of(model) -> str:
    """Hash all tensors of a model, those of an adapter too."""
    return digest(*(value for name, tensor in sorted(model.state_dict().items()) for value in (name, tensor.numpy())))


def use_weights(folder: Path) -> tuple:
    """Load the network."""
    from vggt_lora.model.vggt import VGGT

    model = VGGT.from_pretrained(folder / "model")
    return tensors_of(model), [str(model.load_report).replace(str(folder), "")]


def use_adapter(folder: Path) -> tuple:
    """Load the network with its adapter."""
    from vggt_lora.adapters.adapter import load_adapter
    from vggt_lora.model.vggt import VGGT

    model = load_adapter(VGGT.from_pretrained(folder / "model"), folder / "adapter")
    scales = sorted({str(m.scaling) for m in model.modules() if hasattr(m, "scaling")})
    return tensors_of(model) + str(scales), []


def tensors_changed(path: str, change):
    """Put a state dict through `change` and write it again."""
    def damage(folder: Path) -> str:
        from safetensors.torch import load_file, save

        return write(folder / path, save({k: v.contiguous() for k, v in change(load_file(folder / path)).items()}))
    return damage


def one(change, pick=0):
    """Change one tensor of a state dict."""
    def apply(tensors):
        name = sorted(tensors)[pick]
        return {**tensors, name: change(tensors[name].clone())}
    return apply


def without(count: int):
    """Leave the first tensors out."""
    return lambda tensors: {name: tensors[name] for name in sorted(tensors)[count:]}


def with_value(value: float):
    """Put a value into one place."""
    def apply(tensor):
        tensor.view(-1)[-1] = value
        return tensor
    return apply


class Trap:
    """A pickle that would leave a mark if it were run."""

    def __reduce__(self):
        return Path.touch, (Path("the_trap_was_sprung"),)


def as_torch_file(content) -> object:
    """Put a torch file in the place of the safetensors."""
    def damage(folder: Path) -> str:
        (folder / WEIGHTS).unlink()
        kept = io.BytesIO()
        value = content(folder) if callable(content) else content
        if isinstance(value, bytes):
            kept.write(value)
        else:
            torch.save(value, kept)
        return write(folder / "model/model.pt", kept.getvalue())
    return damage


def header_says(text: str | bytes, size: int | None = None):
    """A safetensors file with this header, and a length of our choice."""
    raw = text.encode() if isinstance(text, str) else text
    return lambda content: struct.pack("<Q", len(raw) if size is None else size) + raw


def linked(path: str, where: str | None):
    """Put a link in a file's place; None: to the file itself, moved out of its folder."""
    def damage(folder: Path) -> str:
        target = folder / f"moved-{Path(path).name}"
        (folder / path).rename(target)
        (folder / path).symlink_to(where or target)
        return Path(path).name
    return damage


def json_changed(path: str, *says: str, **changes):
    """Change fields of a JSON file; None removes one. A message has to name the file, or what is in `says`."""
    def damage(folder: Path) -> str:
        fields = json.loads((folder / path).read_text())
        for name, value in changes.items():
            fields.pop(name, None) if value is None else fields.__setitem__(name, value)
        return (write(folder / path, json.dumps(fields)), *says)
    return damage


SAFETENSORS = {
    "empty": lambda b: b"",
    "cut after 5 bytes": lambda b: b[:5],
    "header cut": lambda b: b[:100],
    "cut in the middle": lambda b: b[: len(b) // 2],
    "last byte lost": lambda b: b[:-1],
    "bytes behind the end": lambda b: b + b"more",
    "header of 2**63 bytes": header_says("{}", 2**63),
    "header longer than the file": header_says("{}", 10**6),
    "header no JSON": header_says("no json"),
    "header of nothing": header_says("{}"),
    "header deep": header_says("[" * 5000),
    "offsets outside": header_says('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "offsets backwards": header_says('{"a":{"dtype":"F32","shape":[0],"data_offsets":[8,0]}}'),
    "shape of billions": header_says('{"a":{"dtype":"F32","shape":[4000000000,4000000000],"data_offsets":[0,16]}}'),
    "unknown dtype": header_says('{"a":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}}'),
    "a pickle": lambda b: pickle.dumps(Trap()),
    "text": lambda b: b"weights",
    "HTML": lambda b: b"<!DOCTYPE html>404",
    "git LFS pointer": lambda b: b"version https://git-lfs.github.com/spec/v1\n",
    "a zip": lambda b: b"PK\x03\x04" + bytes(100),
    "zero bytes": lambda b: bytes(len(b)),
}
TENSORS = {
    "one missing": without(1),
    "ten missing": without(10),
    "all but one missing": lambda t: dict(sorted(t.items())[:1]),
    "one too many": lambda t: {**t, "more.weight": torch.zeros(2)},
    "a prefix": lambda t: {f"module.{k}": v for k, v in t.items()},
    "wrong shape": one(lambda v: v.reshape(-1)[:-1] if v.numel() > 1 else torch.zeros(3)),
    "an axis more": one(lambda v: v[None]),
    "float64": one(lambda v: v.double()),
    "whole numbers": one(lambda v: v.int()),
    "nan": one(with_value(float("nan"))),
    "infinity": one(with_value(float("inf")), 5),
    "empty tensor": one(lambda v: v.reshape(-1)[:0]),
    "names in capitals": lambda t: {k.upper(): v for k, v in t.items()},
}
MODEL_FIELDS = {
    "depth": [3, 5, 0, -1, 2.5, "four", None, 10**9],
    "embed_dim": [65, 128, 0],
    "num_heads": [3, 0, 64],
    "img_size": [71, 140],
    "patch_size": [15],
    "dpt_layers": [[0, 1, 2], [0, 1, 2, 9], "0123"],
    "camera_head": [False, "yes"],
    "mlp_ratio": [0, float("nan"), 3],
    "frame_chunk": [0],
    "auto_map": [{"AutoModel": "evil.Model"}],
    "model_type": ["llama"],
    "trust_remote_code": [True],
    "custom_pipelines": [{"x": {"impl": "evil.Pipe"}}],
    "_target_": ["os.system"],
    "architectures": [["Evil"]],
}
LORA_FIELDS = {
    "r": [0, -1, 3, 2.5, "2", None, 10**9],
    "lora_alpha": ["x", -1, None, float("nan")],
    "lora_dropout": [2, "a"],
    "peft_type": ["PROMPT_TUNING", None, 7],
    "target_modules": [None, [], 7, "(", "^(no_such_module)$", [".."], "(a+)+$"],
    "modules_to_save": [7, ["no_such_module"]],
    "auto_mapping": [{"base_model_class": "os", "parent_library": "subprocess"}],
    "bias": ["all", 3],
    "init_lora_weights": ["pissa", "eva"],
    "task_type": ["CAUSAL_LM"],
    "layers_to_transform": [[99]],
    "rank_pattern": [{"aggregator": 9}],
    "alpha_pattern": [{".*": 0.5}],
    "use_rslora": [True],
    "use_dora": [True],
    "surprise": [1],
    "fan_in_fan_out": [True],
    "megatron_config": [{"x": 1}],
    "megatron_core": ["antigravity"],
    "exclude_modules": ["(.+)+x"],
    "layers_pattern": ["(a|aa)*b"],
    "loftq_config": [{"loftq_bits": 4}],
    "trainable_token_indices": [[1]],
    "layer_replication": [[[0, 9]]],
    "trust_remote_code": [True],
    "auto_map": [{"AutoModel": "evil.Model"}],
}
# expressions that take for ever on names of modules
ENDLESS = {
    "target_modules": r"([a-z_0-9.]+)+[a-z_0-9.]+\|",
    "rank_pattern": {r"(.*)*\|": 4},
    "alpha_pattern": {".*.*.*.*.*.*.*.*x": 2},
}


# honest settings of PEFT: such an adapter is scaled otherwise, and nothing else shows it
OTHER_NUMBERS = ("alpha_pattern", "use_rslora")


def weights_attacks() -> list[Attack]:
    """Files that are cut or forged, tensors that do not fit, configurations that lie."""
    found = [
        Attack("weights", name, text_changed(WEIGHTS, change), use_weights) for name, change in SAFETENSORS.items()
    ]
    found += [
        Attack("weights", f"tensors: {name}", tensors_changed(WEIGHTS, change), use_weights)
        for name, change in TENSORS.items()
    ]
    found += [
        Attack("weights", "missing", removed(WEIGHTS, "model.safetensors"), use_weights),
        Attack("weights", "a folder in its place", in_place_of(WEIGHTS, Path.mkdir), use_weights),
    ]
    good = {"a": torch.zeros(2)}
    torch_files = {
        "a pickle with code": Trap(), "a dict with code": {**good, "b": Trap()}, "a list": [torch.zeros(2)],
        "other tensors": good, "an empty dict": {}, "a number": 7, "a plain pickle with code": pickle.dumps(Trap()),
        "text": b"weights", "empty": b"", "dict of dicts": {"model": {"a": {"b": 1}}},
    }
    found += [
        Attack("torch weights", name, as_torch_file(content), use_weights) for name, content in torch_files.items()
    ]
    for field, values in MODEL_FIELDS.items():
        found += [
            Attack("weights' config", f"{field}: {value!r}", json_changed(CONFIG, **{field: value}), use_weights)
            for value in values
        ]
    texts = {
        "empty": b"", "no JSON": b"{", "a list": b"[]", "deep": b"[" * 100_000,
        "UTF-16": '{"depth": 4}'.encode("utf-16"), "a number": b"7",
    }
    found += [
        Attack("weights' config", name, text_changed(CONFIG, lambda b, t=text: t), use_weights)
        for name, text in texts.items()
    ]
    return found


def adapter_attacks() -> list[Attack]:
    """The same for adapters."""
    found = [
        Attack("adapter", name, text_changed(ADAPTER, change), use_adapter) for name, change in SAFETENSORS.items()
    ]
    found += [
        Attack("adapter", f"tensors: {name}", tensors_changed(ADAPTER, change), use_adapter)
        for name, change in TENSORS.items()
        if name not in ("float64", "whole numbers")
    ]
    found += [
        Attack("adapter", "missing", removed(ADAPTER), use_adapter),
        Attack(
            "adapter",
            "only the old kind of file",
            lambda folder: (
                removed(ADAPTER)(folder)
                and (write(folder / "adapter/adapter_model.bin", pickle.dumps(Trap())), "adapter_model.safetensors")[1]
            ),
            use_adapter,
        ),
    ]
    for field, values in LORA_FIELDS.items():
        found += [
            Attack(
                "adapter's config", f"{field}: {value!r}",
                json_changed(SETTINGS, "adapter_model.safetensors", **{field: value}), use_adapter,
                data=field in OTHER_NUMBERS,
            )
            for value in values
        ]
    found += [
        Attack("adapter's config", f"{field} without end", json_changed(SETTINGS, **{field: value}), use_adapter)
        for field, value in ENDLESS.items()
    ]
    for path in (ADAPTER, SETTINGS, ABOUT):
        found += [
            Attack("adapter", f"{Path(path).name} is a link {name}", linked(path, where), use_adapter)
            for name, where in {
                "to the file outside": None, "to the system's": "/etc/hostname", "to itself": Path(path).name,
                "to a device": "/dev/zero",
            }.items()
        ]
    texts = {"empty": b"", "no JSON": b"{", "a list": b"[]", "deep": b"[" * 100_000, "missing": None}
    for path, group in ((SETTINGS, "adapter's config"), (ABOUT, "adapter's base")):
        found += [
            Attack(
                group, name, text_changed(path, lambda b, t=text: t) if text is not None else removed(path), use_adapter
            )
            for name, text in texts.items()
        ]
    found += [
        Attack(
            "adapter's base", f"fingerprint {value!r}",
            json_changed(ABOUT, "adapter was trained on another base", base_fingerprint=value), use_adapter,
        )
        for value in ("0" * 64, 7, [], "")
    ]
    found.append(
        Attack(
            "adapter's base", "another network",
            lambda folder: (tensors_changed(WEIGHTS, one(with_value(0.5)))(folder), "adapter"), use_adapter,
        )
    )
    return found
