"""Merge an adapter of strategy c into VGGT-1B with random weights, and compare with the official key list.

    python benchmarks/export_1b.py [--to FOLDER]

Needs 17 GB of disk and 14 GB of memory; takes some minutes on a CPU. Prints one line per step with seconds, and peak
memory at the end. The exit status is 1 if keys, shapes or dtypes differ from the official list, or if that list is
absent.
"""
import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from vggt_lora.adapters.adapter import apply_lora, save_adapter
from vggt_lora.adapters.export import StoredTensors, export_adapter, export_merged
from vggt_lora.files.atomic import write_json
from vggt_lora.model.vggt import VGGT, VGGTConfig
from vggt_lora.reference_data import reference


def official() -> dict | None:
    """Key -> {"shape", "dtype"} of the official checkpoint, or None where the list is absent."""
    path = reference("vggt_1b_state_dict.json")
    content = json.loads(path.read_text(encoding="utf-8")) if path else {}
    return next(
        (v for v in content.values() if isinstance(v, dict) and isinstance(v.get("aggregator.camera_token"), dict)),
        None,
    )


def step(text: str, since: float) -> float:
    """Print what was done and how long it took; returns the time now."""
    print(f"{time.perf_counter() - since:7.1f} s  {text}", flush=True)
    return time.perf_counter()


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", help="folder for temporary files (default: the system's)")
    place = Path(tempfile.mkdtemp(prefix="vggt_lora_export_", dir=parser.parse_args(arguments).to))
    if shutil.disk_usage(place).free < 17e9:
        sys.exit(f"{place}: less than 17 GB free")
    try:
        return run(place)
    finally:
        shutil.rmtree(place)


def run(place: Path) -> int:
    """All steps, in a folder of their own."""
    since = time.perf_counter()
    torch.manual_seed(0)
    VGGT(VGGTConfig.vggt_1b()).save_pretrained(place / "base")
    (place / "base" / "config.json").unlink()  # as on the hub, where no configuration of ours lies beside the weights
    since = step("VGGT-1B with random weights written", since)
    model = VGGT.from_pretrained(place / "base", point_head=False)
    adapted, targets = apply_lora(
        model, "c", rank=16,
        full_finetune=["depth_head.resize_layers.0", "depth_head.resize_layers.1", "depth_head.norm"], seed=0,
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.002 * torch.randn_like(parameter))
    settings = {"strategy": "c", "model": str(place / "base")}
    save_adapter(adapted, place / "run" / "adapter", {"config": settings})
    write_json(place / "run" / "config.json", {"config": settings})
    del model, adapted
    since = step(f"adapter with {targets.trainable:,} numbers written", since)
    report = export_merged(place / "run", place / "merged")
    since = step(str(report).replace(str(place), "..."), since)
    export_adapter(place / "run", place / "adapter", base="facebook/VGGT-1B")
    since = step("adapter exported for the official class", since)
    wanted, faults = official(), 0
    for name in ("model.safetensors", "model.pt") if wanted else ():
        stored = StoredTensors(place / "merged" / name)
        found = {
            key: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for key, tensor in stored.items()
        }
        faults += found != wanted
        since = step(
            f"{name}: {len(found)} tensors, keys, shapes and dtypes {'equal' if found == wanted else 'DIFFER FROM'} "
            "the official list",
            since,
        )
    print(
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"
        + ("" if wanted else "; official key list absent: not compared")
    )
    return 0 if wanted and not faults else 1


if __name__ == "__main__":
    sys.exit(main())
