"""Training and caching of the demo's models."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from symgeo.data import digits
from symgeo.demo.checkpoints import Checkpoint, CheckpointError, cache_folder, fingerprint, inspect, load
from symgeo.demo.runner import train_all
from symgeo.demo.training import GATE, Metrics, Recipe, Setting, evaluate, full, grid, quick, train

SETTINGS = (Setting(5e-3, 0.0, 1.0, 64, seed=3), Setting(1e-2, 1.0, 1.0, 32, seed=4))
TINY = Recipe(SETTINGS, steps=20, train=100)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    return train_all(tmp_path_factory.mktemp("quick"), workers=2, recipe=quick())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on a busy machine wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path: Path) -> list[Checkpoint]:
    return train_all(tmp_path, workers=1, recipe=TINY)


def test_grid_is_every_combination_with_its_own_seed() -> None:
    settings = grid()
    assert len(settings) == 24
    assert len({(s.lr, s.weight_decay, s.init_scale, s.batch_size) for s in settings}) == 24
    assert len({s.seed for s in settings + grid(seed=1)}) == 48


@pytest.mark.slow
def test_quick_models_are_trained_to_the_end_and_differ(trained: list[Checkpoint]) -> None:
    assert len(trained) == 6
    assert all(c.metrics.train_accuracy >= GATE and not c.metrics.excluded for c in trained)
    gaps = [c.metrics.loss_gap for c in trained]
    assert min(gaps) > 0
    assert max(gaps) > 1.5 * min(gaps)


@pytest.mark.slow
def test_metrics_on_file_are_those_of_the_loaded_model(trained: list[Checkpoint]) -> None:
    model, checkpoint = load(trained[1].path)
    data = digits(quick().train, quick().split_seed)
    correct = (model(data.test_images).argmax(-1) == data.test_labels).double().mean()
    assert float(correct) == checkpoint.metrics.test_accuracy
    assert checkpoint == trained[1]
    gap = checkpoint.metrics.error_gap
    assert gap == pytest.approx((1 - float(correct)) - (1 - checkpoint.metrics.train_accuracy))


@pytest.mark.slow
def test_workers_give_what_one_process_gives(trained: list[Checkpoint], tmp_path: Path) -> None:
    alone = Recipe(quick().settings[2:3], quick().steps, quick().train, quick().split_seed)
    threads = torch.get_num_threads()
    checkpoint = train_all(tmp_path, workers=1, recipe=alone)[0]
    assert torch.get_num_threads() == threads
    for name, value in checkpoint.params().items():
        torch.testing.assert_close(value, trained[2].params()[name], rtol=0, atol=0)


def test_underfitted_model_is_kept_and_marked(tiny: list[Checkpoint]) -> None:
    assert [c.metrics.excluded for c in tiny] == [True, True]
    assert [c.setting for c in tiny] == list(SETTINGS)


def test_file_says_how_it_was_trained(tiny: list[Checkpoint]) -> None:
    with safe_open(tiny[1].path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["lr"] == "0.01"
    assert metadata["batch_size"] == "32"
    assert float(metadata["test_loss"]) == tiny[1].metrics.test_loss
    assert [p.name for p in sorted(tiny[0].path.parent.iterdir())] == [
        "model-00.safetensors",
        "model-01.safetensors",
    ]


def test_cached_models_are_not_trained_again(tiny: list[Checkpoint]) -> None:
    written = [c.path.stat().st_mtime_ns for c in tiny]
    seen: list[tuple[int, int]] = []
    again = train_all(tiny[0].path.parent, recipe=TINY, progress=lambda done, total, _: seen.append((done, total)))
    assert again == tiny
    assert [c.path.stat().st_mtime_ns for c in again] == written
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "nan", "foreign"])
def test_damaged_file_is_trained_again_alone(tiny: list[Checkpoint], damage: str) -> None:
    path, kept = tiny[0].path, tiny[1].path.stat().st_mtime_ns
    params = tiny[0].params()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage in ("text", "empty"):
        path.write_text("not a checkpoint" * (damage == "text"))
    elif damage == "nan":
        save_file(params | {"head.bias": torch.full((10,), torch.nan)}, path)
    else:
        save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"model-00\.safetensors"):
        inspect(path)
    again = train_all(path.parent, workers=1, recipe=TINY)
    assert again == tiny
    torch.testing.assert_close(again[0].params(), params, rtol=0, atol=0)
    assert tiny[1].path.stat().st_mtime_ns == kept


def test_other_steps_in_the_same_folder_are_another_model(tiny: list[Checkpoint]) -> None:
    longer = train_all(tiny[0].path.parent, workers=1, recipe=Recipe(SETTINGS, steps=21, train=100))
    assert longer[0].fingerprint != tiny[0].fingerprint
    assert longer[0].metrics != tiny[0].metrics


def test_missing_metadata_is_named(tiny: list[Checkpoint]) -> None:
    save_file(tiny[0].params(), tiny[0].path)
    with pytest.raises(CheckpointError, match="needed the numbers lr"):
        inspect(tiny[0].path)


def test_cache_folder_follows_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(full()) == tmp_path / "symgeo" / f"demo-{fingerprint(full())}"
    assert len({cache_folder(r) for r in (full(), quick(), full(seed=1), TINY)}) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(full()).parent == tmp_path / "home" / ".cache" / "symgeo"


def test_seed_decides_the_model() -> None:
    data = digits(100)
    first, same = (train(SETTINGS[0], data, steps=5) for _ in range(2))
    other = train(Setting(5e-3, 0.0, 1.0, 64, seed=9), data, steps=5)
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert isinstance(evaluate(first, data), Metrics)


def test_batch_larger_than_the_data_takes_all_of_it() -> None:
    params = train(Setting(5e-3, 0.0, 1.0, 64, seed=0), digits(17), steps=4)
    assert params["head.weight"].isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow")
def test_divergence_is_reported() -> None:
    with pytest.raises(ValueError, match="setting: training diverged"):
        train(Setting(1e30, 0.0, 1.0, 64, seed=0), digits(100), steps=30)


@pytest.mark.slow
def test_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from symgeo.demo.runner import train_all\n"
        "from symgeo.demo.training import Recipe, grid\n"
        f"train_all({str(tmp_path / 'models')!r}, recipe=Recipe(grid()[:2], steps=3, train=50))\n"
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "RuntimeError: a worker process died; in a script, call under if __name__" in ended.stderr


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers: needed at least 1, found 0"):
        train_all(tmp_path, workers=0)
    with pytest.raises(ValueError, match="steps: needed at least 2, found 1"):
        train(SETTINGS[0], digits(100), steps=1)
