"""`mmllm doctor`."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from mmllm.cli.common import cache_dir, common, print_json

EPILOG = """\
examples:
  mmllm doctor
  mmllm doctor --json

exit codes: 0 everything required works, 2 it does not
"""
CORE = ("torch", "torchvision", "transformers", "accelerate", "av", "numpy", "pillow", "tokenizers", "safetensors")
OPTIONAL = {
    "decord": "second video back end (Linux on x86-64 only)",
    "timm": "encoders from timm",
    "open_clip_torch": "encoders from OpenCLIP",
    "deepspeed": "ZeRO",
    "datasets": "training data in Parquet and Arrow",
    "webdataset": "tar shards",
}
ENCODER = "libx264"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        section: the section it belongs to.
        item: the package, device, back end or folder.
        state: its version or figure, or what is wrong with it.
        good: whether it is present and works.
        core: whether everything depends on it.
        hint: a command that installs what is missing.
    """

    section: str
    item: str
    state: str
    good: bool = True
    core: bool = False
    hint: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog = EPILOG
    parser.description = "Report versions, devices and video back ends, tested on the spot, and what is missing."
    common(parser, "--json", "--plugin", "--cache-dir")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the tests and print the findings."""
    found = [*_packages(), *_devices(), *_media(), *_disks(cache_dir(options))]
    works = all(finding.good for finding in found if finding.core)
    if options.json:
        print_json({"works": works, "findings": [asdict(finding) for finding in found]})
    else:
        _print(found, works)
    return 0 if works else 2


def _print(found: list[Finding], works: bool) -> None:
    """Print a table, and the commands that install what is missing."""
    widths = [max(len(getattr(finding, key)) for finding in found) for key in ("section", "item")]
    section = ""
    for finding in found:
        head = finding.section if finding.section != section else ""
        section = finding.section
        mark = "ok" if finding.good else "MISSING" if finding.core else "-"
        print(f"{head:{widths[0]}}  {mark:7}  {finding.item:{widths[1]}}  {finding.state}")
    hints = [f"  {finding.hint}    # {finding.item}" for finding in found if not finding.good and finding.hint]
    if hints:
        print("\nwhat is missing comes with", *hints, sep="\n")
    print("\nwhat is needed works" if works else "\nsomething that is needed is missing (MISSING)")


def _packages() -> list[Finding]:
    """Versions, from the packages' own records: nothing is imported."""
    from mmllm import __version__

    found = [
        Finding("versions", "python", platform.python_version()),
        Finding("versions", "mmllm", __version__),
    ]
    for name in (*CORE, *OPTIONAL):
        core, purpose = name in CORE, OPTIONAL.get(name, "")
        try:
            found.append(Finding("versions", name, metadata.version(name), core=core))
        except metadata.PackageNotFoundError:
            state = f"not installed; for {purpose}" if purpose else "not installed"
            found.append(Finding("versions", name, state, False, core, _install(name)))
    return found


def _install(name: str) -> str:
    """The command that installs a package: by the extra that contains it, otherwise by itself."""
    try:
        wanted = metadata.requires("mmllm") or []
    except metadata.PackageNotFoundError:
        wanted = []
    extras: list[str] = []
    for line in wanted:
        package = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if package and extra and package[0].lower().replace("_", "-") == name.replace("_", "-"):
            extras.append(extra[1])
    extras.sort(key=lambda extra: extra == "dev")  # it contains everything: the last one to suggest
    return f'pip install "mmllm[{extras[0]}]"' if extras else f"pip install {name.replace('_', '-')}"


def _devices() -> list[Finding]:
    """Accelerators, through torch's neutral interface."""
    try:
        import torch

        if not torch.accelerator.is_available():
            return [Finding("devices", "cpu", f"{os.cpu_count()} cores, no accelerator")]
        kind = torch.accelerator.current_accelerator().type
        module, found = torch.get_device_module(kind), []
        for index in range(torch.accelerator.device_count()):
            facts = module.get_device_properties(index) if hasattr(module, "get_device_properties") else None
            size = getattr(facts, "total_memory", None)
            state = getattr(facts, "name", kind) + (f", {size / 2**30:.1f} GiB" if size else "")
            found.append(Finding("devices", f"{kind}:{index}", state))
        return found
    except Exception as error:  # this command is there to report broken drivers
        return [Finding("devices", "torch", f"does not load ({_short(error)})", False, True, _install("torch"))]


def _media() -> list[Finding]:
    """FFmpeg's libraries, the encoder that NanoWorld needs, and each back end on a clip written on the spot."""
    try:
        import av

        libraries = ", ".join(f"{name[3:]} {'.'.join(map(str, part))}" for name, part in av.library_versions.items())
        found = [Finding("media", "ffmpeg (of av)", libraries)]
    except Exception as error:  # as above
        return [Finding("media", "av", f"does not load ({_short(error)})", False, True, _install("av"))]
    with tempfile.TemporaryDirectory() as folder:
        clip, trouble = Path(folder) / "clip.mp4", ""
        for codec in (ENCODER, "mpeg4"):
            try:
                _write_clip(clip, codec)
                break
            except Exception as error:  # any problem with the encoder is a finding
                trouble = trouble or _short(error)
        hint = "pip install --force-reinstall --no-deps av    (its wheels have it)" if trouble else ""
        state = f"cannot be used ({trouble}); NanoWorld needs it" if trouble else "writes H.264"
        found.append(Finding("media", f"encoder {ENCODER}", state, not trouble, hint=hint))
        found += _backends(clip)
    return found


def _backends(clip: Path) -> list[Finding]:
    """Each registered back end on a clip of 8 frames, in a process that may die from it."""
    from mmllm.contract.errors import UserError
    from mmllm.contract.registry import parts, plugins
    from mmllm.data.media.guard import GuardedReader
    from mmllm.data.media.limits import Limits
    from mmllm.data.media.sampling import Sampling
    from mmllm.data.media.types import MediaRef

    found, heard = [], _LogCapture()
    log = logging.getLogger("mmllm.data.media.reader")
    log.addHandler(heard)
    for name, backend in sorted(parts("backend").items(), reverse=True):
        start, heard.texts = time.perf_counter(), []
        with GuardedReader(name, Limits(timeout=20), plugins()) as reader:
            try:
                read = len(reader.read(MediaRef("video", str(clip)), Sampling(frames=8)).frames)
                trouble = heard.texts[0].partition(": ")[2] if heard.texts else ""
            except UserError as error:
                read, trouble = 0, str(error)
        seconds = time.perf_counter() - start
        state = f"does not decode ({trouble})" if trouble else f"decoded {read} frames in {seconds:.2f} s"
        hint = _install(backend.package) if trouble and backend.package else ""
        found.append(Finding("back ends", name, state, not trouble, name == "pyav", hint))
    log.removeHandler(heard)
    return found


class _LogCapture(logging.Handler):
    """Collects a reader's warnings: above all, that it had to fall back."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Record one warning."""
        self.texts.append(record.getMessage())


def _write_clip(path: Path, codec: str) -> None:
    """Write eight frames of 64 x 48 pixels."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in range(8):
            picture = np.full((48, 64, 3), number * 30, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _disks(cache: Path) -> list[Finding]:
    """Free space in the folders that fill up."""
    hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    found = []
    for name, folder in (("cache", cache), ("models of the hub", hub)):
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(there).free / 2**30
        found.append(Finding("disk", name, f"{free:.1f} GiB free in {folder}"))
    return found


def _short(error: BaseException) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
