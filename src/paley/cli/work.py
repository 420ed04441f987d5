"""Between the verbs' arguments and the library: the recipe meant, the models, the text to score."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from paley import hf
from paley.core.errors import PaleyError
from paley.data import TokenBlocks, token_blocks
from paley.eval.perplexity import EvalResult, evaluate
from paley.eval.reference import Reference
from paley.format.spec import QUANT_METHOD
from paley.model.loading import open_source, resolve
from paley.pipeline import Monitor
from paley.plan import Plan
from paley.recipe import Recipe, Test, apply_settings, load_recipe, preset, preset_methods

__all__ = [
    "Wish",
    "check_device",
    "evaluate_model",
    "kv_bytes_at_16_bits",
    "load_model",
    "load_tokenizer",
    "scored_text",
]

# Settings that errors about a text name, as `paley eval` calls them.
_AS_OPTIONS = {"test.sequences": "--sequences", "test.seq_len": "--seq-len", "test.source": "--data"}


@dataclass(frozen=True)
class Wish:
    """The options of `quantize` and `plan` that say what is wanted."""

    preset: str | None = None
    recipe: Path | None = None
    plan: Path | None = None
    settings: tuple[str, ...] = ()
    calibration: str | None = None
    test: str | None = None
    expand: str | None = None
    seed: int | None = None

    def chosen(self) -> Recipe | Plan:
        """The recipe with all settings put in, or the plan; raises unless one of the three is named."""
        given = {"--preset": self.preset, "--recipe": self.recipe, "--plan": self.plan}
        named = [option for option, value in given.items() if value is not None]
        if not named:
            methods = ", ".join(f"{m}-w4a4kv4" for m in preset_methods())
            raise PaleyError(
                "say what to do: --preset NAME (w4a4kv4, w3a3kv3, w4a16, ...; by another method: "
                f"{methods}; see `paley presets`), --recipe FILE or --plan FILE"
            )
        if len(named) > 1:
            raise PaleyError(f"{' and '.join(named)} exclude each other: give one of them")
        settings = self._all_settings()
        if self.plan is not None:
            if settings:
                raise PaleyError(
                    f"--plan is executed as it stands, but {settings[0]!r} would change it; edit the file, "
                    "or make a new one with `paley plan`"
                )
            return Plan.load(self.plan)
        recipe = preset(self.preset) if self.preset is not None else load_recipe(self.recipe or "")
        return apply_settings(recipe, settings)

    def _all_settings(self) -> list[str]:
        """--set, then the options that are shorter names of settings; text quoted, as values are YAML."""
        quoted = {"calibration.source": self.calibration, "test.source": self.test}
        plain = {"expand": self.expand, "seed": self.seed}
        found = [f"{key}={json.dumps(v, ensure_ascii=False)}" for key, v in quoted.items() if v is not None]
        return [*self.settings, *found, *(f"{key}={v}" for key, v in plain.items() if v is not None)]


def check_device(name: str) -> str:
    """-> name, if torch can put a model there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise PaleyError(f"--device {name}: no such device; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise PaleyError(f"--device {name}: is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise PaleyError(f"--device {name}: torch sees {count} CUDA devices here; use cpu")
    return name


def is_paley(folder: Path) -> bool:
    """Whether config.json says that the model is in our format; False where it cannot be read."""
    try:
        section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        return section["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, LookupError, TypeError):
        return False


def load_model(model: str, device: str) -> PreTrainedModel:
    """A Paley folder, with unpacked weights for speed, or an ordinary checkpoint (folder or Hub name)."""
    path = resolve(model)
    if is_paley(path):
        return hf.load(path, device=device, dense=True)
    return open_source(path).load(device=device)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder (or of the Hub name) `model`."""
    path = resolve(model)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PaleyError(f"{path}: no tokenizer can be loaded here: {error}") from error


def scored_text(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    data: str | None,
    sequences: int | None,
    seq_len: int | None,
) -> TokenBlocks:
    """The text to score `model` on: `data`, or what its plan was reported on, or pydoc's test part.

    A source that the plan calibrated or searched on gives its test part, as `quantize` itself has it.
    """
    plan_file = resolve(model) / "plan.json"
    recipe = Plan.load(plan_file).recipe if plan_file.is_file() else None
    test = recipe.test if recipe is not None else Test()
    tuned_on = ["pydoc"] if recipe is None else _tuned_on(recipe)
    source = data or test.source or (recipe.calibration.source if recipe is not None else "pydoc")
    try:
        return token_blocks(
            source,
            tokenizer,
            role="test",
            count=sequences or test.sequences,
            seq_len=seq_len or test.seq_len,
            whole=not any(_same(source, other) for other in tuned_on),
        )
    except PaleyError as error:
        message = str(error)
        for setting, option in _AS_OPTIONS.items():
            message = message.replace(setting, option)
        raise PaleyError(message) from error


def _tuned_on(recipe: Recipe) -> list[str]:
    """The sources of the roles calibration and search, as `pipeline.texts.gather` cuts them."""
    searched = recipe.search.method != "none"
    calibrated = searched or (recipe.weights is not None and recipe.weights.method == "gptq")
    found = [recipe.calibration.source] if calibrated else []
    return [*found, recipe.search.source] if searched and recipe.search.source is not None else found


def _same(source: str, other: str) -> bool:
    """Two names of one file are one source."""
    first, second = Path(source), Path(other)
    return source == other or (first.exists() and second.exists() and first.samefile(second))


def kv_bytes_at_16_bits(folder: Path) -> int:
    """Bytes that one token's keys and values take in an unquantized cache of 16-bit floats."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config = config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim


def evaluate_model(model: str, against: str | None, blocks: TokenBlocks, device: str, monitor: Monitor) -> EvalResult:
    """Scores `model` on test blocks; the original, `against`, is measured first, and gone by then."""
    reference = None
    if against is not None:
        monitor.stage("measuring the original", 1)
        reference = Reference.of(open_source(against).load(device=device), blocks)
    monitor.stage("loading the model", 1)
    loaded = load_model(model, device)
    monitor.stage("evaluating", len(blocks.ids))
    seen = 0

    def advance(done: int, total: int) -> None:
        nonlocal seen
        for _ in range(done - seen):
            monitor.step()
        seen = done

    return evaluate(loaded, blocks, reference, progress=advance)
