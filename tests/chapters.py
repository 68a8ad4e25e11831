"""Parameters that make the numbered notebooks small: two buildings, small photos, one epoch."""
from pathlib import Path

SMALL = {"epochs": 1, "frames": 4, "overlap": 0.0, "image_size": 112,
         "scenes": "demo_a,demo_held", "hold_out": "demo_held"}


def parameters(folder: Path) -> dict[str, dict]:
    """Return the parameters of each chapter; what they write goes below `folder`, and 04 reads the run of 03."""
    run = str(folder / "run")
    words = {name: f'"{value}"' if "," in str(value) else value for name, value in SMALL.items()}
    settings = "; ".join(f"{name}={word}" for name, word in words.items())
    return {
        "00_data": {},
        "01_depth": {"image_size": 252, "audit_photos": 6},
        "02_lora": {},
        "03_train": {**SMALL, "output": run},
        "04_evaluate": {"run": run, "pictures": 1, "protocol": "median"},
        "05_compare": {"output": str(folder / "compare"), "grid": "strategy=a", "jobs": 1, "pictures": 1,
                       "settings": settings},
        "06_predict": {"model": "tiny", "image_size": 112, "output": str(folder / "predict")},
    }
