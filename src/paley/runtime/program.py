"""A model as the engine's list of steps: what a row says, in the order of computation."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paley.arch import Linear, Norm, Site
from paley.arch.row import HEAD_INPUT, STREAM
from paley.core import packing
from paley.core.errors import PaleyError
from paley.core.grids import Grid
from paley.core.rounding import OUTLIER_GRID
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme
from paley.core.transforms import Transform
from paley.format.spec import BIAS, CODES, DIAGONAL, OUTLIER_COLUMNS, SCALES, WEIGHT, ZEROS
from paley.kernels import matmul, rounding
from paley.runtime import native
from paley.runtime.native import array
from paley.runtime.rope import Rope, rope_of, rope_settings
from paley.runtime.support import Facts, why_not_rounded
from paley.runtime.weights import Mapped, dense_weight, error_of_blocks, floats, plain_shape, scheme_of, stored_weight

__all__ = ["Program", "build"]

_HALF = torch.float16


@dataclass(eq=False)
class Program:
    """The C structs of a model. kept: what they point to. products: which product each linear got, and why."""

    ropes: list[Rope] = field(default_factory=list)
    products: dict[str, str] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)
    wires: dict[str, int] = field(default_factory=dict)
    parts: dict[str, list[Any]] = field(default_factory=dict)
    bytes_read: int = 0

    def add(self, kind: str, item: Any) -> int:
        """-> its number among those of its kind."""
        found = self.parts.setdefault(kind, [])
        found.append(item)
        return len(found) - 1

    def keep(self, item: Tensor | Any | None) -> int | None:
        """-> the address of a tensor, or of a struct, that lives as long as the program."""
        if item is None:
            return None
        self.kept.append(item)
        return item.data_ptr() if isinstance(item, Tensor) else ctypes.addressof(item)

    def how(
        self, width: int, scheme: ActivationScheme | None, transform: Transform | None, dtype: torch.dtype,
        *, back: bool = False,
    ) -> int | None:  # fmt: skip
        """The address of a rounding; None if nothing is done."""
        if scheme is None and transform is None:
            return None
        found = rounding.rounding_of(width, scheme, transform, dtype, back)
        self.kept.append(found)
        return ctypes.addressof(found.raw)

    def wire(self, name: str, width: int) -> int:
        """The wire of that name, in a buffer of its own."""
        if name not in self.wires:
            buffer = self.add("widths", width)
            self.wires[name] = self.add("wire", native.WireStruct(buffer, 0, width))
        number = self.wires[name]
        if (has := self.parts["wire"][number].width) != width:
            raise PaleyError(f"engine: the wire {name!r} has {has} values, {width} are wanted")
        return number

    def split(self, wire: int, parts: dict[str, int]) -> None:
        """Names the parts of a wire, one after the other."""
        whole = self.parts["wire"][wire]
        start = whole.start
        for name, width in parts.items():
            if name not in self.wires:
                self.wires[name] = self.add("wire", native.WireStruct(whole.buffer, start, width))
            start += width

    def step(self, kind: str, **fields: Any) -> None:
        self.add("step", native.StepStruct(kind=native.STEPS.index(kind), **fields))

    def struct(self, facts: Facts, logits: int) -> native.ModelStruct:
        kinds = {
            "widths": ctypes.c_int32, "wire": native.WireStruct, "input": native.InputStruct,
            "linear": native.LinearStruct, "embedding": native.EmbeddingStruct, "attention": native.AttentionStruct,
            "step": native.StepStruct,
        }  # fmt: skip
        arrays = {name: array(kind, self.parts.get(name, [])) for name, kind in kinds.items()}
        self.kept.append(arrays)
        counts = [len(self.parts.get(name, [])) for name in kinds]
        model = native.ModelStruct(*counts, facts.config.vocab_size, facts.sites.blocks, len(self.ropes), logits)
        for name, items in arrays.items():
            setattr(model, name, ctypes.addressof(items))
        return model


def build(facts: Facts, tensors: Mapped, threads: int) -> tuple[Program, native.ModelStruct]:
    """The steps of a whole model; as many threads make its matrices."""
    builder = _Builder(facts, tensors)
    builder.embed()
    for block in range(facts.sites.blocks):
        builder.block(block)
    logits = builder.head()
    with ThreadPoolExecutor(threads) as pool:  # each makes whole ones: none waits for another on a busy machine
        list(pool.map(lambda fill: fill(), reversed(builder.fills)))  # the head, which is the largest, first
    return builder.program, builder.program.struct(facts, logits)


class _Builder:
    def __init__(self, facts: Facts, tensors: Mapped):
        self.facts, self.tensors, self.row = facts, tensors, facts.row
        self.program = Program()
        self.sizes = facts.row.sizes(facts.config)
        self.stream = int(facts.config.hidden_size)
        self.inputs: dict[Hashable, int] = {}
        self.ropes: dict[str, int] = {}
        self.pending: list[Site] = []
        self.fills: list[Callable[[], None]] = []

    def wire(self, name: str) -> int:
        """A wire that is not in `sizes` is what a norm makes of the stream, or one turns into it."""
        return self.program.wire(name, self.sizes.get(name) or self.stream)

    # --- outside of the blocks

    def embed(self) -> None:
        facts, name = self.facts, self.row.embedding
        scheme, (rows, columns) = scheme_of(facts, name), plain_shape(facts, name)
        scale = facts.number("embedding_multiplier", 1.0) * self.row_scale(columns)
        item = native.EmbeddingStruct(rows=rows, width=scheme.stored_width(columns), factor=scale)
        grid = None if scheme.weight is None else scheme.weight.grid
        if grid is None or not isinstance(grid, Grid):
            plain, undone = dense_weight(facts, self.tensors, name) if grid is not None else (
                self.tensors[name + WEIGHT], False
            )  # fmt: skip
            item.stored, item.weight = native.STORED[str(plain.dtype).removeprefix("torch.")], self.program.keep(plain)
            item.row_bytes, item.width = plain.stride(0) * plain.itemsize, plain.shape[1]
            back = None if undone else scheme.transform
        else:
            codes, scales = self.tensors[name + CODES], self.tensors[name + SCALES]
            item.stored, item.weight, item.row_bytes = native.STORED["codes"], self.program.keep(codes), codes.shape[1]
            item.n, item.p = grid.size, grid.p
            item.symbol_codes, item.symbol_bits = packing.symbol(grid.size)
            item.points = self.program.keep(grid.points.float().contiguous())
            item.scales, item.groups = self.program.keep(scales), scales.shape[1]
            item.zeros = self.program.keep(self.tensors[name + ZEROS]) if grid.affine else None
            back = scheme.transform
        if back is not None:
            item.back = self.program.how(back.out_dim, None, back, torch.float32, back=True)
        if facts.spec.stream is not None:
            item.stream = self.program.how(facts.spec.stream.in_dim, None, facts.spec.stream, torch.float32)
        index = self.program.add("embedding", item)
        self.program.step("embed", index=index, out=self.wire(STREAM))

    def row_scale(self, columns: int) -> float:
        """What the family multiplies looked-up rows by, rounded as it does."""
        return float(torch.tensor(self.row.scale_at(columns)))

    def head(self) -> int:
        facts, row, spec = self.facts, self.row, self.facts.spec
        columns, program = plain_shape(facts, row.head)[1], self.program
        last = program.wire("last", self.stream)
        program.step("last", input=self.wire(STREAM), out=last)
        if spec.stream is not None:
            turned = program.wire("last_turned", columns)
            how = program.how(spec.stream.out_dim, None, spec.stream, torch.float32, back=True)
            shrink = (spec.stream.in_dim / spec.stream.out_dim) ** 0.5
            program.step("turn", input=last, out=turned, how=how, value=shrink)
            last = turned
        self.sizes[HEAD_INPUT] = columns
        self.norm(row.norm, last, self.wire(HEAD_INPUT), columns)
        self.sizes["logits"] = facts.config.vocab_size
        self.multiply([facts.sites[row.head]], "logits")
        logits = self.wire("logits")
        if (divisor := facts.number("logit_divisor", 1.0)) != 1.0:
            program.step("scale", input=logits, value=1 / divisor)
        if cap := facts.number("logit_softcap", 0.0):
            program.step("cap", input=logits, value=cap)
        return logits

    # --- a block

    def block(self, index: int) -> None:
        name = f"{self.row.blocks}.{index}"
        self.inputs.clear()
        for part in self.row.block:
            if isinstance(part, Norm):
                self.flush()
                size = self.facts.head_dim if part.over_heads and not part.whole else None
                self.norm(f"{name}.{part.path}", self.wire(part.reads), self.wire(part.writes), size)
            elif isinstance(part, Linear):
                if self.pending and self.pending[0].reads != f"{name}.{part.reads}":
                    self.flush()
                if part.reads == self.row.attended:
                    self.attend(index)
                elif part.reads == self.row.gated:
                    gate = self.wire(self.row.gate)
                    self.program.step(
                        "gate", input=gate, other=self.wire(self.row.up), out=self.wire(self.row.gated),
                        index=native.ACTIVATIONS[self.facts.activation],
                    )  # fmt: skip
                self.pending.append(self.facts.sites[f"{name}.{part.path}"])
            else:
                self.program.wires[part.writes] = self.wire(part.reads)
        self.flush()

    def flush(self) -> None:
        if self.pending:
            self.multiply(self.pending)
            self.pending = []

    def norm(self, name: str, reads: int, writes: int, size: int | None) -> None:
        gain = floats(self.tensors, name + WEIGHT) + self.row.gain_offset
        self.program.step(
            "norm", input=reads, out=writes, size=size or len(gain), vector=self.program.keep(gain),
            value=self.facts.config.rms_norm_eps, flag=int(writes == self.wires(STREAM) and reads != writes),
        )  # fmt: skip

    def wires(self, name: str) -> int:
        return self.program.wires.get(name, -1)

    def multiply(self, sites: list[Site], writes: str | None = None) -> None:
        """Linears that read one wire, one after the other."""
        found = [self.linear(site, writes) for site in sites]
        for index in dict.fromkeys(linear.input for linear in found):
            self.program.step("input", index=index)
        numbers = [self.program.add("linear", linear) for linear in found]
        self.program.step("multiply", index=numbers[0], count=len(numbers))

    def linear(self, site: Site, writes: str | None) -> native.LinearStruct:
        assert site.reads is not None
        scheme, stored = scheme_of(self.facts, site.name), site.stored_as
        wire = self.wire(writes or (STREAM if site.adds_to_stream else str(site.writes)))
        self.program.split(wire, {part: self.sizes[part] for part in site.fused})
        factor = self.facts.number("residual_multiplier", 1.0) if site.adds_to_stream else 1.0
        bias = floats(self.tensors, site.name + BIAS) if site.name + BIAS in self.tensors else None
        item = native.LinearStruct(
            wire=wire, adds=int(site.adds_to_stream), rows=site.shape[0], bias=self.program.keep(bias), factor=factor
        )
        reads = self.wire(site.reads.rpartition(".")[2])
        width = scheme.stored_width(plain_shape(self.facts, site.name)[1])
        # Outlier columns of an input that is not rounded stay floats, which integers of one scale are not.
        exact = scheme.outliers > 0 and scheme.input is None
        beside = error_of_blocks(self.facts) if site.kind == "head" else 0.0
        if not exact and (plan := matmul.plan(scheme, width, beside)) is not None:
            plan, codes = matmul.fastest(plan), stored_weight(self.facts, self.tensors, site.name)
            matrix = matmul.prepare(codes, scheme, plan, later=self.fills)
            weight, item.columns, how = matrix.blob, width, f"integers {plan.kind}{' fine' if plan.fine else ''}"
            item.stored, item.bytes = native.STORED["matrix"], weight.nbytes
            item.input = self.integers_of(plan, scheme, stored, reads)
        else:
            weight, undone = dense_weight(self.facts, self.tensors, site.name)
            kind = str(weight.dtype).removeprefix("torch.")
            item.stored, item.columns, how = native.STORED[kind], weight.shape[1], f"plain {kind}"
            item.input = self.input_of(scheme, stored, reads, turned=undone)
        item.weight = self.program.keep(weight)
        self.program.products[site.name] = how
        self.program.bytes_read += weight.nbytes
        return item

    def integers_of(self, plan: matmul.Plan, scheme: LinearScheme, stored: str, wire: int) -> int:
        """The number of an input that becomes integers."""
        width = self.program.parts["wire"][wire].width
        diagonal = floats(self.tensors, stored + DIAGONAL) if scheme.diagonal else None
        columns = self.tensors[stored + OUTLIER_COLUMNS] if scheme.outliers else None
        key = wire, plan.shared, scheme.transform, scheme.input, _key(diagonal), _key(columns)
        if key not in self.inputs:
            how, kept = matmul.inputs_how(plan, scheme, width, diagonal, columns)
            self.program.kept.append(kept)
            item = native.InputStruct(wire=wire, width=scheme.stored_width(width), integers=self.program.keep(how))
            self.inputs[key] = self.program.add("input", item)
        return self.inputs[key]

    def input_of(self, scheme: LinearScheme, stored: str, wire: int, *, turned: bool) -> int:
        """The number of an input; linears that make the same of a wire share it."""
        width = self.program.parts["wire"][wire].width
        transform = None if turned else scheme.transform
        diagonal = floats(self.tensors, stored + DIAGONAL) if scheme.diagonal and not turned else None
        outliers = scheme.outliers if scheme.input is not None else 0
        columns = self.tensors[stored + OUTLIER_COLUMNS] if outliers else None
        key = wire, transform, scheme.input, _key(diagonal), _key(columns)
        if key in self.inputs:
            return self.inputs[key]
        if scheme.input is not None and (reason := why_not_rounded(scheme.input)) is not None:
            raise PaleyError(f"engine: {stored}: {reason}")
        out = width if transform is None else transform.out_dim
        item = native.InputStruct(wire=wire, width=out, outliers=outliers, diagonal=self.program.keep(diagonal))
        if outliers:
            item.columns = self.program.keep(columns)
            item.turn = self.program.how(width, None, transform, torch.float32)
            item.how = self.program.how(out, scheme.input, None, torch.float32)
            item.own = self.program.how(outliers, ActivationScheme(OUTLIER_GRID), None, torch.float32)
        else:
            item.how = self.program.how(width, scheme.input, transform, torch.float32)
        self.inputs[key] = self.program.add("input", item)
        return self.inputs[key]

    # --- attention

    def rope(self, block: int) -> int:
        """The number of a block's table of angles."""
        settings = rope_settings(self.facts.config, self.facts.layer_type(block))
        if (key := repr(sorted(settings.items()))) not in self.ropes:
            self.ropes[key] = len(self.program.ropes)
            self.program.ropes.append(rope_of(settings, self.facts.head_dim, self.facts.config))
        return self.ropes[key]

    def attend(self, block: int) -> None:
        self.flush()
        facts, row, config = self.facts, self.row, self.facts.config
        scheme = facts.spec.attentions.get(facts.sites.attention(block), AttentionScheme())
        queries, keys, values = self.wire(row.queries), self.wire(row.keys), self.wire(row.values)
        table, size = self.rope(block), facts.head_dim
        width = self.program.ropes[table].width
        interleaved = int(row.rotary_pairs == "interleaved")
        turns = row.has_rope(config, block)
        for wire in (queries, keys) if turns else ():
            self.program.step("rotate", input=wire, size=size, index=table, count=width, flag=interleaved)
        item = native.AttentionStruct(
            queries=queries, keys=keys, values=values, out=self.wire(row.attended), heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads, size=size, layer=block, window=facts.window(block) or 0, table=table,
            table_width=width, interleaved=interleaved, scaling=facts.attention_scale,
            cap=facts.number("attention_softcap", 0.0),
        )  # fmt: skip
        self.sides(item, scheme, size)
        self.base(item, scheme, block)
        self.program.step("attend", index=self.program.add("attention", item))

    def sides(self, item: native.AttentionStruct, scheme: AttentionScheme, size: int) -> None:
        program = self.program
        turn, back = scheme.key_transform, scheme.value_transform
        item.key_side = self.side(scheme.keys, size if turn is None else turn.out_dim)
        item.value_side = self.side(scheme.values, size if back is None else back.out_dim)
        if turn is not None:
            item.turn = program.how(size, None, turn, torch.float32)
        if scheme.keys is not None:
            centered = bool(scheme.center_keys)
            item.key_how = program.how(
                item.key_side.width if centered else size, scheme.keys, None if centered else turn, _HALF
            )
        if scheme.values is not None:
            item.value_how = program.how(size, scheme.values, back, _HALF)
        if back is not None:
            item.value_back = program.how(back.out_dim, None, back, torch.float32, back=True)

    def side(self, scheme: ActivationScheme | None, width: int) -> native.SideStruct:
        if scheme is None:
            return native.SideStruct(bits=16, width=width, group_size=width)
        grid = scheme.grid
        assert isinstance(grid, Grid)
        side = native.SideStruct(
            bits=grid.size.bit_length() - 1, width=width, group_size=scheme.group_size or width, affine=int(grid.affine)
        )
        if grid.step is not None:
            side.first, side.step = float(grid.points[0]), grid.step
        else:
            points = torch.nn.functional.pad(grid.points[:, 0].float(), (0, max(0, 16 - grid.size)))
            side.points = self.program.keep(points.contiguous())
        return side

    def base(self, item: native.AttentionStruct, scheme: AttentionScheme, block: int) -> None:
        """What keys are stored without."""
        if scheme.keys is None or not scheme.center_keys:
            return
        name, heads = self.facts.sites.attention(block), self.facts.config.num_key_value_heads
        if not self.row.has_rope(self.facts.config, block) and scheme.center_keys is not True:
            raise PaleyError(f"engine: {name}: center_keys={scheme.center_keys!r} without RoPE is not supported")
        if scheme.center_keys is True:
            offsets = floats(self.tensors, f"{name}.key_mean")
            if scheme.transform is not None:
                offsets = scheme.transform.apply(offsets).contiguous()
            item.base = native.BASES["mean"]
        else:
            item.base = native.BASES["turned"]
            if scheme.center_keys == "bias":
                path = f"{self.row.blocks}.{block}.{self.row.maker(self.row.keys).path}{BIAS}"
                rows = self.row.rows(self.row.keys, self.facts.config)
                if path not in self.tensors:
                    raise PaleyError(f"center_keys='bias': {path} is not in the files")
                offsets = floats(self.tensors, path)[rows].view(1, heads, -1).repeat(2, 1, 1).contiguous()
            else:
                offsets = floats(self.tensors, f"{name}.key_offset")
        item.offsets = self.program.keep(offsets)


def _key(values: Tensor | None) -> Hashable:
    """What equal vectors have in common."""
    return None if values is None else values.numpy().tobytes()
