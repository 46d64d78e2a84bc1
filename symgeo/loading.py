"""Models by name: a folder of transformers, a function of the user, a checkpoint of the demo, a hub id."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from symgeo.errors import is_out_of_memory

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
FORMS = "a folder that transformers can load, module:function, or a hub id owner/name"
Say = Callable[[str], None]


def load_model(
    source: str, device: torch.device | None = None, dtype: torch.dtype | None = None, say: Say = print
) -> nn.Module:
    """The model that ``source`` names, in evaluation mode, on ``device`` and in ``dtype`` if they are given.

    ``source`` is a folder with a ``config.json`` (the class that its ``architectures`` names, with eager
    attention, which has all derivatives), ``module:function`` with a function that takes nothing and returns a
    ``torch.nn.Module``, a ``.safetensors`` checkpoint of the demo, or the id of a model on the Hugging Face hub.
    Only a hub id downloads anything; ``say`` is told before it does.

    Raises ``ValueError`` that names the source and what to do, ``ImportError`` where transformers is missing.
    """
    loader = {"folder": _from_folder, "function": _from_function, "checkpoint": _from_checkpoint, "hub": _from_hub}
    model = loader[kind_of(source)](source, say)
    return model.to(device=device, dtype=dtype).eval()


def kind_of(source: str) -> str:
    """Which of "folder", "function", "checkpoint" and "hub" a model's name is; ``ValueError`` for none of them."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"MODEL {source}: the folder holds no config.json; {_instead(path)}")
        return "folder"
    if path.is_file():
        if path.suffix == ".safetensors":
            return "checkpoint"
        raise ValueError(f"MODEL {source}: a file that is no .safetensors checkpoint; give {FORMS}")
    if FUNCTION.fullmatch(source):
        return "function"
    if HUB_ID.fullmatch(source) and not path.parent.exists():
        return "hub"
    raise ValueError(f"MODEL {source}: no such folder; give {FORMS}")


def _instead(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return "it is a PEFT adapter: give module:function with a function that returns the model with its adapter"
    return "give a folder written by save_pretrained"


def call(source: str, what: str) -> Any:
    """What the function ``module:function`` returns; the current directory is importable while it runs."""
    module_name, _, function_name = source.partition(":")
    with _importable(Path.cwd()):
        try:
            module = import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
                raise ValueError(
                    f"{what} {source}: no module {error.name!r} here; run from the folder that holds it, or install it"
                ) from error
            raise ValueError(f"{what} {source}: {module_name} needs {error.name!r}; pip install it") from error
        except Exception as error:
            raise ValueError(f"{what} {source}: {module_name} does not import: {_named(error)}") from error
        function = getattr(module, function_name, None)
        if not callable(function):
            raise ValueError(
                f"{what} {source}: {module_name} has no function {function_name!r}; define it, or name another"
            )
        try:
            return function()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"{what} {source}: {function_name}() raised {_named(error)}; correct it") from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _from_function(source: str, say: Say) -> nn.Module:
    model = call(source, "MODEL")
    if not isinstance(model, nn.Module):
        raise ValueError(f"MODEL {source}: needed a torch.nn.Module, the function returned {type(model).__name__}")
    return model


def _from_checkpoint(source: str, say: Say) -> nn.Module:
    from symgeo.demo.checkpoints import load

    return load(source)[0]


def _from_hub(source: str, say: Say) -> nn.Module:
    say(f"MODEL {source} is no folder here: taking it from the Hugging Face hub, which may download it")
    return _pretrained(source, local=False)


def _from_folder(source: str, say: Say) -> nn.Module:
    return _pretrained(source, local=True)


def _pretrained(source: str, local: bool) -> nn.Module:
    transformers = _transformers()
    options = {"local_files_only": local, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        model, info = _model_class(transformers, config).from_pretrained(
            source, config=config, attn_implementation="eager", output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        hint = "give a folder written by save_pretrained" if local else "check the id and the network, or give a folder"
        raise ValueError(f"MODEL {source}: transformers cannot load it ({str(error).strip()}); {hint}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"MODEL {source}: the weights lack {len(missing)} parameters of {type(model).__name__}, which would be "
            f"random ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); name the class that was saved "
            'in config.json under "architectures"'
        )
    loaded: nn.Module = model
    return loaded


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"loading this model needs transformers: pip install 'symgeo[hf]' ({error})") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _model_class(transformers: Any, config: Any) -> Any:
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModel
