"""Settings of sphinx-gallery: every example runs, in a size of a minute at most; pictures it writes are its images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sphinx_gallery.scrapers import figure_rst

HEADER = """Gallery
=======

Every file of ``examples/`` as it is, run when these pages were built, in the smallest size that shows what it is about.
Sizes and options are those of its ``--help``; the figures quoted elsewhere on these pages are of full sizes.
"""
OUT = "out"
SIZES = {
    "invariant_flatness": "full",
    "merge_lora": "medium",
    "optimizer_char_lm": "medium",
    "precondition_from_a_group": "full",
    "study_checkpoints": "medium",
}  # the others: small


def settings(examples: Path, stage: Path) -> dict[str, Any]:
    """The examples are run in a copy, so that the folder they come from stays clean."""
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(examples, stage, ignore=shutil.ignore_patterns(OUT, "__pycache__", "*.md"))
    (stage / "GALLERY_HEADER.rst").write_text(HEADER)
    return {
        "examples_dirs": str(stage),
        "gallery_dirs": "gallery",
        "filename_pattern": r"\.py$",
        "ignore_pattern": r"(^|/)_\w+\.py$",
        "image_scrapers": ("gallery.written",),
        "reset_argv": "gallery.arguments",
        "download_all_examples": False,
        "show_signature": False,
        "backreferences_dir": "gallery/backreferences",
        "write_computation_times": False,
        "remove_config_comments": True,
        "plot_gallery": "True",
    }


def arguments(gallery_conf: dict[str, Any], script_vars: dict[str, Any]) -> list[str]:
    """The command line of every example."""
    name = Path(script_vars["src_file"]).stem
    return ["--size", SIZES.get(name, "small"), "--out", f"{OUT}/{name}"]


def written(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Pictures that a block wrote, as its images."""
    script = Path(block_vars["src_file"])
    seen = block_vars["example_globals"].setdefault("__pictures__", {})
    images = []
    for picture in sorted((script.parent / OUT / script.stem).rglob("*.png"), key=lambda file: file.stat().st_mtime):
        stamp = picture.stat().st_mtime_ns
        if seen.get(picture) != stamp:
            seen[picture] = stamp
            images.append(next(block_vars["image_path_iterator"]))
            shutil.copyfile(picture, images[-1])
    return figure_rst(images, gallery_conf["src_dir"])
