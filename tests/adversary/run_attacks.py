"""Attacks on what a run is told and what it keeps: parameters, splits, the frame store, generated scenes."""
import dataclasses
import json
import struct
from pathlib import Path

import numpy as np

from tests.adversary.attack import Attack, digest, write

SIZE = (56, 84)


# --- parameters -------------------------------------------------------------------------------------------------------

def parameters(**values):
    """Parameters of a run; a message has to name the first of them."""
    def damage(folder: Path) -> str:
        write(folder / "parameters.json", json.dumps(values))
        return next(iter(values))
    return damage


def use_parameters(folder: Path) -> tuple:
    """Build the configuration of a run."""
    from vggt_lora.training.config import TrainConfig

    path = folder / "parameters.json"
    config = TrainConfig.from_parameters(json.loads(path.read_text()) if path.exists() else {})
    return repr(config), []


WRONG = {
    "str": [7, None, ["a"]],
    "int": ["x", 1.5, True, None, -1, 10**12],
    "float": ["x", float("nan"), float("inf"), -1.0, None, False],
    "bool": ["yes", 2, None],
}
MADE_UP = {
    "strategy": ["z", ""], "supervision": ["lidar", "sparse+sparse", "", "+"], "eval_supervision": ["guess"],
    "units_are_metres": ["maybe"], "image_mode": ["stretch"], "precision": ["float8"], "device": ["tpu"],
    "image_size": [100, 13], "epochs": [0], "frames": [0], "rank": [0], "alpha": [0.0], "max_grad_norm": [0.0],
    "train_fraction": [1.0, 0.0],
}
TOGETHER = {
    "depth limits the wrong way round": {"depth_min": 5.0, "depth_max": 1.0},
    "custom without targets": {"strategy": "custom"},
    "targets without custom": {"targets": "depth_head"},
    "resume without output": {"resume": True},
    "smallest rate above the peak": {"min_lr": 0.5},
    "no loss": {"camera_weight": 0.0, "depth_conf_weight": 0.0, "depth_reg_weight": 0.0, "depth_grad_weight": 0.0},
    "a misspelt name": {"epoch": 3},
    "a name with code": {"__class__": "x"},
    "an empty name": {"": 1},
    "another case": {"Strategy": "b"},
}


def parameter_attacks() -> list[Attack]:
    """Every field with values of a wrong type and outside its range."""
    from vggt_lora.settings import settings_of
    from vggt_lora.training.config import TrainConfig

    found = []
    for field in settings_of(TrainConfig):
        for value in (*WRONG[field.type.__name__], *MADE_UP.get(field.name, ())):
            if value is None and (field.optional or field.default == ""):
                continue  # the model's own, or off
            found.append(
                Attack("parameters", f"{field.name} = {value!r}", parameters(**{field.name: value}), use_parameters)
            )
    for name, values in TOGETHER.items():
        says = {"no loss": "loss weights"}.get(name)
        damage = parameters(**values)
        found.append(
            Attack(
                "parameters",
                name,
                (
                    lambda folder, d=damage, s=says: (
                        (d(folder), s)[1] or next(iter(json.loads((folder / "parameters.json").read_text())))
                    )
                ),
                use_parameters,
            )
        )
    return found


# --- splits -----------------------------------------------------------------------------------------------------------

def split_of(**values):
    """Settings of a split; a message has to name one of them, or what they name."""
    def damage(folder: Path) -> tuple:
        write(folder / "split.json", json.dumps(values))
        return (
            *values,
            *[
                name
                for value in values.values()
                for name in (value if isinstance(value, list) else [repr(str(value).split(",")[0])])
            ],
            "has no frames",
        )
    return damage


def use_split(folder: Path) -> tuple:
    """Split two scenes that are copies of one another in all but their photos, and audit it."""
    from vggt_lora.scenes.opening import open_scene
    from vggt_lora.datasets.splits import audit_split, split_windows

    path = folder / "split.json"
    settings = {"frames": 2, "overlap": 0.5, "train_fraction": 0.6, "hold_out": (), "groups": ""} | (
        json.loads(path.read_text()) if path.exists() else {}
    )
    scenes = [open_scene(folder)]
    if settings.pop("photos", None) is not None:
        scenes = [dataclasses.replace(scenes[0], frames=scenes[0].frames[: json.loads(path.read_text())["photos"]])]
    split = split_windows(scenes, **settings)
    return digest(repr(split)), [split.summary(), json.dumps(audit_split(split, scenes, settings["groups"]))]


SPLITS = [
    {"photos": 1}, {"photos": 0}, {"photos": 2}, {"frames": 0}, {"frames": -3}, {"frames": 100}, {"overlap": 1.0},
    {"overlap": -0.5}, {"overlap": 5}, {"train_fraction": 0}, {"train_fraction": 1}, {"train_fraction": 1e-9},
    {"train_fraction": 2}, {"hold_out": ["nowhere"]}, {"hold_out": ["small_house"]}, {"groups": "a,b"},
    {"groups": "small_house"}, {"groups": "small_house,small_house"}, {"groups": ";;,"},
]


def split_attacks() -> list[Attack]:
    """One photo, no overlap, everything held out, groups that are none."""
    return [
        Attack("split", ", ".join(f"{n} = {v!r}" for n, v in settings.items()), split_of(**settings), use_split)
        for settings in SPLITS
    ]


# --- the frame store --------------------------------------------------------------------------------------------------

def use_store(folder: Path) -> tuple:
    """Read all frames through the store that lies beside the scene; a damaged entry has to be told and made anew."""
    import warnings

    from vggt_lora.scenes.opening import open_scene
    from vggt_lora.datasets.frame_store import FrameStore

    scene = open_scene(folder / "small_house")
    store = FrameStore(84, supervision="laser+sparse", folder=folder / "frames")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = [store.get(scene, index, SIZE) for index in range(len(scene))]
    return digest(
        *(part for d in data for part in (np.array(d.image), np.array(d.depth.depth), np.array(d.depth.weight)))
    ), list(store.report.damaged)


def make_store(scene: Path, folder: Path) -> Path:
    """Copy a scene and fill a store beside it."""
    from tests.adversary.attack import copy_of

    copy_of(scene, folder / "small_house")
    use_store(folder)
    return folder


def entry_changed(change):
    """Put the bytes of the first entry through `change`; None removes it."""
    def damage(folder: Path) -> str:
        path = sorted((folder / "frames").rglob("*.safetensors"))[0]
        changed = change(path.read_bytes())
        if changed is None:
            path.unlink()
            return path.name
        return write(path, changed)
    return damage


def flip(place: float):
    """Flip one bit."""
    def change(content: bytes) -> bytes:
        data = bytearray(content)
        data[int(place * (len(data) - 1))] ^= 4
        return bytes(data)
    return change


def other_entry(folder: Path) -> str:
    """One entry under the name of another."""
    first, second, *_ = sorted((folder / "frames").rglob("*.safetensors"))
    return write(first, second.read_bytes())


def store_attacks() -> list[Attack]:
    """Entries that are cut, flipped, swapped or gone: the frame is the same afterwards."""
    changes = {
        "empty": lambda b: b"", "gone": lambda b: None, "zero bytes": lambda b: bytes(len(b)),
        "bytes behind the end": lambda b: b + b"more", "text": lambda b: b"entry",
        "header of 2**60": lambda b: struct.pack("<Q", 2**60) + b[8:],
        "header deep": lambda b: struct.pack("<Q", 90_000) + b"[" * 90_000,
    }
    changes |= {
        f"cut after {share:.0%}": lambda b, s=share: b[: int(s * len(b))] for share in (0.001, 0.01, 0.1, 0.5, 0.99)
    }
    changes |= {f"a bit flipped at {place:.1%}": flip(place) for place in (0, 0.002, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1)}
    return [Attack("frame store", name, entry_changed(change), use_store) for name, change in changes.items()] + [
        Attack("frame store", "another frame's entry", other_entry, use_store)
    ]


# --- generated scenes -------------------------------------------------------------------------------------------------

def use_generated(folder: Path) -> tuple:
    """Ask whether a generated scene is whole; what is wrong has to be named."""
    from vggt_lora.core import SceneError
    from vggt_lora.demo.demo_scenes import scene_fault

    fault = scene_fault(folder)
    if fault:
        raise SceneError(fault)
    return "whole", []


def generated_attacks() -> list[Attack]:
    """Each kind of file of a generated scene changed by a bit, cut, and gone."""
    from tests.adversary.scene_attacks import ALIGNMENT, DEPTH, MASK, MESH, PHOTO, SCAN, removed, text_changed

    found = []
    for path in (
        ALIGNMENT, DEPTH, MASK, MESH, PHOTO, SCAN, "labels/parts/DSC_5627.png", "dslr_calibration_jpg/points3D.txt",
        "complete.json",
    ):
        # the list of sums accuses the file whose sum it has wrong
        also = ("is damaged",) if path == "complete.json" else ()
        found += [
            Attack("generated scene", f"{path} {name}", text_changed(path, change, *also), use_generated)
            for name, change in (("cut", lambda b: b[:-3]), ("flipped", flip(0.5)), ("empty", lambda b: b""))
        ]
        found.append(Attack("generated scene", f"{path} gone", removed(path), use_generated))
    return found


# --- checkpoints and the cache of frozen layers -----------------------------------------------------------------------

def use_checkpoint(folder: Path) -> tuple:
    """Read a checkpoint; what it holds has to be what was written."""
    from vggt_lora.training.checkpoint import content_digest, read_checkpoint

    return content_digest(read_checkpoint(folder / "step-00000001.pt")), []


def make_checkpoint(folder: Path) -> Path:
    """Write the checkpoint of a small layer."""
    import torch

    from vggt_lora.training.checkpoint import save_checkpoint

    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8)
    save_checkpoint(
        folder / "step-00000001.pt", layer, torch.optim.AdamW(layer.parameters()),
        [{"torch": torch.zeros(3), "python": [1, [2], None]}], step=1,
    )
    return folder


def use_prefix(folder: Path) -> tuple:
    """Ask for a state that lies in the cache; a damaged entry has to be told and made anew."""
    import torch

    from vggt_lora.model.vggt import VGGT, VGGTConfig
    from vggt_lora.efficiency.feature_store import FeatureStore

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, photos = VGGT(VGGTConfig.golden()).eval(), torch.rand(2, 3, 28, 28)
    store = FeatureStore(model, 0, folder=folder / "prefix")
    state = store.state(photos, ("one", "two"))
    return digest(state.tokens.numpy(), *(tensor.numpy() for tensor in state.outputs.values())), [
        text.replace(str(folder), "") for text in store.report.damaged
    ]


def make_prefix(folder: Path) -> Path:
    """Fill the cache with one entry."""
    use_prefix(folder)
    return folder


def kept_attacks() -> dict[str, list[Attack]]:
    """What a run and a cache keep between two starts: cut, flipped, forged."""
    import pickle

    from tests.adversary.network_attacks import SAFETENSORS, Trap
    from tests.adversary.scene_attacks import text_changed

    changes = {
        "empty": lambda b: b"", "text": lambda b: b"checkpoint", "a pickle with code": lambda b: pickle.dumps(Trap()),
        "zero bytes": lambda b: bytes(len(b)), "bytes behind the end": lambda b: b + b"more",
    }
    changes |= {f"cut after {share:.0%}": lambda b, s=share: b[: int(s * len(b))] for share in (0.01, 0.3, 0.6, 0.99)}
    changes |= {f"a bit flipped at {place:.0%}": flip(place) for place in (0, 0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1)}

    def entry(change):
        def damage(folder: Path) -> str:
            path = next((folder / "prefix").rglob("*.safetensors"))
            return write(path, change(path.read_bytes()))
        return damage

    entries = SAFETENSORS | {n: c for n, c in changes.items() if n.startswith(("cut", "a bit"))}
    return {
        "checkpoint": [
            Attack("checkpoint", name, text_changed("step-00000001.pt", change), use_checkpoint)
            for name, change in changes.items()
        ],
        "prefix": [Attack("frozen layers", name, entry(change), use_prefix) for name, change in entries.items()],
    }
