"""Packaging: the folders of the top level become one import package, `mmllm`.

`encoders/` is imported as `mmllm.encoders`, and so on: nothing called `train` or `eval` leaks into site-packages.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup

FOLDERS = ("encoders", "connectors", "reducers", "train", "eval")

DATA = ["datasets>=3", "webdataset>=0.2.100"]
LORA = ["peft>=0.19"]
TOWERS = ["gguf>=0.10", "open_clip_torch>=3.3", "timm>=1.0.31"]

packages = ["mmllm", *(f"mmllm.{name}" for name in find_namespace_packages("mmllm") if "recipes" not in name)]
package_dir = {"mmllm": "mmllm"}
for folder in FOLDERS:
    package_dir[f"mmllm.{folder}"] = folder
    packages += [f"mmllm.{folder}", *(f"mmllm.{folder}.{name}" for name in find_namespace_packages(folder))]

setup(
    name="mmllm",
    version="0.1.0",
    description="Build, train, evaluate and compare video and image LLMs out of interchangeable parts",
    license="Apache-2.0",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=[name for name in packages if "__pycache__" not in name],
    package_dir=package_dir,
    package_data={"mmllm": ["recipes/*.yaml", "recipes/*/*.yaml"]},
    install_requires=[
        "accelerate>=1.10",
        "av>=14",
        'decord>=0.6; sys_platform == "linux" and platform_machine == "x86_64"',
        "filelock>=3.12",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10",
        "pyyaml>=6",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "torch>=2.9",
        "torchvision>=0.24",
        "transformers>=5.23",
    ],
    extras_require={
        "data": DATA,
        "deepspeed": ["deepspeed>=0.17"],
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9", "setuptools>=77", "trl>=1.0", *LORA, *DATA, *TOWERS],
        "lora": LORA,
        "towers": TOWERS,
    },
    entry_points={"console_scripts": ["mmllm=mmllm.cli:main"]},
)
