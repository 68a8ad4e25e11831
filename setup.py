"""Packaging: every value comes from settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("notebooks", "views", "compare")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["vggt_lora", "vggt_lora.*"]),
    package_data={"vggt_lora": ["weights/*.safetensors", "weights/*.json"]},
    install_requires=cfg["requirements"].split(),
    extras_require={**extras, "dev": sum(extras.values(), []) + cfg["dev_requirements"].split()},
    entry_points={"nbdev": ["vggt_lora=vggt_lora._modidx:d"], "console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
