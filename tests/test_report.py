"""Reports: finite JSON, files that appear whole or not at all, pages with the numbers in them, and the demo."""

import json
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest

from symgeo import report
from symgeo.demo import training
from symgeo.demo.output import folder
from symgeo.demo.run import Plan, run_demo
from symgeo.demo.training import Recipe, grid
from symgeo.plots import target


class Text(HTMLParser):
    """The text of a page, and what it refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.sources = "", []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_json_is_finite_and_whole(tmp_path: Path):
    path = tmp_path / "deep" / "report.json"
    report.write_json(path, {"a": float("inf"), "b": [float("nan"), 1.5, True, None], "c": Path("x"), 3: (1,)})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5, True, None], "c": "x", "3": [1]}
    with pytest.raises(ZeroDivisionError), report.replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert json.loads(path.read_text())["c"] == "x"
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_paths_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="its folder cannot be made"):
        report.prepare(tmp_path / "file" / "report.json")
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        report.prepare(tmp_path)
    with pytest.raises(ValueError, match=r"written as .png or .pdf; give the file one of these"):
        target(tmp_path / "figure.svg")


def test_page_escapes_and_stands_alone(tmp_path: Path):
    (tmp_path / "dot.png").write_bytes(b"\x89PNG")
    page = report.page(
        "a < b", report.paragraph("x & y"), report.table(["<h>"], [["1"]]), report.figure(tmp_path / "dot.png", '"q"'),
        report.bullets(["<script>"]), report.heading("h"),
    )  # fmt: skip
    assert "<script>" not in page and "a &lt; b" in page and 'alt="&quot;q&quot;"' in page
    read = Text(page)
    assert "x & y" in read.text and read.sources == ["data:image/png;base64,iVBORw=="]


def test_folder_appears_whole_or_not_at_all(tmp_path: Path):
    out = tmp_path / "new" / "demo"
    with pytest.raises(ZeroDivisionError), folder(out) as temporary:
        (temporary / "report.json").write_text("{}")
        raise ZeroDivisionError
    assert list(out.parent.iterdir()) == []
    out.mkdir()  # an empty folder is accepted
    for text in ("first", "second"):  # and so is an earlier report
        with folder(out) as temporary:
            report.write_json(temporary / "report.json", report.document("demo", {}, {"text": text}, 0.0))
        assert text in (out / "report.json").read_text()
    assert [p.name for p in out.parent.iterdir()] == ["demo"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"it holds notes.txt and is no report of this demo"), folder(out):
        raise AssertionError("not reached")
    assert (out / "notes.txt").read_text() == "mine" and "second" in (out / "report.json").read_text()


@pytest.mark.parametrize("content", ["{", "[]", '{"tool": "symgeo", "command": "study"}'])
def test_folder_of_another_tool_is_refused(content: str, tmp_path: Path):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match="it is not empty and is no report"), folder(tmp_path):
        raise AssertionError("not reached")
    with pytest.raises(ValueError, match="it is no folder"), folder(tmp_path / "report.json"):
        raise AssertionError("not reached")


def test_demo_writes_a_report_with_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sklearn")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = grid(lrs=(5e-3,), weight_decays=(0.0, 0.3, 1.0), init_scales=(1.0,), batch_sizes=(32,))
    radii = {"euclidean": (0.1,), "adaptive": (0.3,), "geodesic inv": (0.1,), "geodesic mix": (0.1,)}
    plan = Plan(Recipe(settings, steps=20), radii, images=16, steps=2, orbit_conditions=(1.0, 100.0), orbit_images=8)
    with pytest.raises(ValueError, match="no model of the demo fits its training data"):
        run_demo(tmp_path / "out", workers=1, plan=plan)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(training, "GATE", 0.0)
    said: list[str] = []
    demo = run_demo(tmp_path / "out", workers=1, say=said.append, plan=plan)
    assert said and {p.name for p in (tmp_path / "out").iterdir()} == {
        "report.html", "report.json", "tau.png", "scatter.png", "orbit.png",
    }  # fmt: skip
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["schema"] == 1 and document["settings"]["plan"]["steps"] == 2
    assert len(document["result"]["models"]) == 3 and set(document["result"]["timings"]) >= {"training", "sharpness"}
    page = Text((tmp_path / "out" / "report.html").read_text())
    assert len(page.sources) == 3 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    for correlation in demo.study.correlations:
        assert str(correlation) in page.text and str(correlation) in demo.text
    orbit = demo.orbit
    assert max(orbit.output_change) < 1e-12 and min(orbit.moved) > 0.1
    assert max(orbit.change("geodesic inv")) < 1e-8 and max(orbit.change("geodesic mix")) < 1e-8
    assert max(orbit.change("adaptive")) > 1e-3
    assert f"{orbit.sharpness['adaptive'][1]:.6g}" in page.text
