"""Times training steps of Transformers models by implementation of attention, in turns.

    python -m profiling.transformers_models [--model NAME ...] [--implementation NAME ...]
        [--seconds S] [--json FILE] [--tiny] [--short] [--packed]

The models have random weights and no head. A step is forward and backward, in bf16 on a GPU. Before
anything is timed, each output is compared with sdpa's in fp32, on more tokens than a window has. It
may be twice as far off as sdpa is in the dtype that is timed; a wrong one ends the program with 1.
Implementations that cannot run are left out, with the reason. A bracket holds the quartiles over
the rounds. ``--packed`` packs documents into the row, an eighth of it on average, and leaves out
ModernBERT, for which Transformers' own masks ignore them. ``--tiny`` takes small models, to try the
script on a CPU.
"""

import argparse
import inspect
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import create_sliding_window_causal_mask

from flexlocal.integrations.transformers import register

from . import machine
from .bench import trouble
from .options import reader
from .terminal import number, table
from .timing import Run, Timing, first_call, in_turns, ratio_of_rounds, synchronize

OURS = "flexlocal"
IMPLEMENTATIONS = {
    OURS: ("flexlocal", "sdpa"),
    "flexlocal, full layers too": ("flexlocal", "flexlocal"),
    "sdpa": ("sdpa", "sdpa"),
    "flex_attention": ("flex_attention", "sdpa"),
    "FlashAttention 4": ("flash_attention_4", "sdpa"),
    "FlashAttention 2": ("flash_attention_2", "sdpa"),
}
"""Transformers' name of each, and what flexlocal is registered with meanwhile."""

TRUTH = "sdpa"
LONG_MASK = 131_072  # tokens


@dataclass(frozen=True)
class Case:
    """A model and its inputs, ``(batch, tokens)``.

    Attributes:
        name: for the command line.
        model: a class of Transformers.
        config: its config.
        checked: what results are compared on.
        timed: what steps are timed on.
    """

    name: str
    model: str
    config: Any
    checked: tuple[int, int]
    timed: tuple[tuple[int, int], ...]


def cases(tiny: bool) -> list[Case]:
    """ModernBERT-base, and models like Mistral and Gemma 3 of 12 layers; tiny ones have three."""
    layers = {"num_hidden_layers": 3 if tiny else 12}
    shared = {"attention_dropout": 0.0, "max_position_embeddings": 16384}
    window = 32 if tiny else None

    def sized(**sizes: int) -> dict[str, Any]:
        small = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
        words = {"vocab_size": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return {**shared, **words, **layers, **sizes, **(small if tiny else {})}

    bert = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4} if tiny else {}
    modernbert = transformers.ModernBertConfig(
        **shared, **bert, **(layers if tiny else {}), local_attention=window or 128
    )
    mistral = transformers.MistralConfig(
        **sized(
            hidden_size=2048,
            intermediate_size=5504,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=128,
        ),
        sliding_window=window or 1024,
    )
    gemma = transformers.Gemma3TextConfig(
        **sized(
            hidden_size=1152,
            intermediate_size=6912,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
        ),
        sliding_window=window or 512,
        **({"layer_types": 2 * ["sliding_attention"] + ["full_attention"]} if tiny else {}),
    )
    if tiny:
        one, few = (1, 96), ((1, 128),)
        return [
            Case("ModernBERT-base", "ModernBertModel", modernbert, one, few),
            Case("Mistral-like", "MistralModel", mistral, one, few),
            Case("Gemma-3-like", "Gemma3TextModel", gemma, one, few),
        ]
    short, long = (1, 512), (1, 16384)
    return [
        Case("ModernBERT-base", "ModernBertModel", modernbert, (1, 512), ((8, 8192), short)),
        Case("Mistral-like", "MistralModel", mistral, (1, 2560), (long, short)),
        Case("Gemma-3-like", "Gemma3TextModel", gemma, (1, 1536), (long, short)),
    ]


def models_of(
    case: Case, names: Sequence[str], device: torch.device, dtype: torch.dtype
) -> dict[str, nn.Module | str]:
    """The model by each implementation, over the same weights; the reason where there is none."""
    made: dict[str, nn.Module | str] = {}
    weights: dict[str, Tensor] = {}
    for name in names:
        implementation, full = IMPLEMENTATIONS[name]
        register(full_attention=full)
        try:
            with device:  # to draw weights on a processor takes longer than all that follows
                model = getattr(transformers, case.model)._from_config(
                    type(case.config)(**case.config.to_dict()),
                    attn_implementation=implementation,
                    dtype=dtype,
                )
        except Exception as missing:  # whatever it is, the others go on
            made[name] = trouble(missing)[1]
            continue
        model = model.train()
        if weights:
            model.load_state_dict(weights, assign=True)
        for weight in model.parameters() if not weights else ():
            if weight.dim() > 1:  # drawn as usual, the layers before the last would hardly count
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        weights = weights or model.state_dict(keep_vars=True)
        made[name] = model
    return made


def packed(ids: Tensor) -> dict[str, Any]:
    """``ids`` ``(1, n)`` as documents, an eighth of the row on average, as collators pack them."""
    (n,), generator = ids.shape[1:], torch.Generator().manual_seed(2)
    begins = torch.rand(n, generator=generator) < 8 / n
    begins[0] = True
    starts = begins.nonzero()[:, 0]
    sums = torch.cat([starts, torch.tensor([n])])
    positions = torch.arange(n) - starts[begins.cumsum(0) - 1]
    longest = int(sums.diff().max())
    told = sums.to(ids.device, torch.int32)
    return {
        "input_ids": ids, "position_ids": positions[None].to(ids.device),
        "cu_seq_lens_q": told, "cu_seq_lens_k": told,
        "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def step_of(name: str, model: nn.Module, given: dict[str, Any]) -> Run:
    """A training step, which returns the output; the output itself is its gradient."""
    full = IMPLEMENTATIONS[name][1]
    no_cache = {} if "Bert" in type(model).__name__ else {"use_cache": False}

    def run() -> Tensor:
        register(full_attention=full)  # takes microseconds
        model.zero_grad(set_to_none=True)
        out: Tensor = model(**given, **no_cache).last_hidden_state
        out.backward(out.detach())
        return out.detach()

    return run


def checked(
    models: dict[str, nn.Module | str], given: dict[str, Any], dtype: torch.dtype
) -> dict[str, float | str]:
    """How far each output is off, over what it may be: above 1 is wrong. Or why there is none."""
    truth_model: Any = models[TRUTH]
    cast(truth_model, torch.float32)  # the weights are one another's
    truth: Any = step_of(TRUTH, truth_model, given)()
    cast(truth_model, dtype)
    found: dict[str, Any] = {}
    for name, model in models.items():
        if isinstance(model, str):
            found[name] = model
            continue
        try:
            result: Any = step_of(name, model, given)()
        except Exception as error:  # whatever it is, the others go on
            found[name] = trouble(error)[1]
            continue
        found[name] = (result.double() - truth.double()).norm().item()
    allowed = max(2 * found[TRUTH], 1e-4 * truth.double().norm().item())
    return {name: off if isinstance(off, str) else off / allowed for name, off in found.items()}


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Turns the weights, in place, and nothing else: angles of rotation stay in fp32."""
    model.zero_grad(set_to_none=True)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def steps_ms(run: Run, device: torch.device, seconds: float) -> float:
    """Median milliseconds of steps that take so many seconds together, one at least."""
    found, start = [], time.perf_counter()
    while not found or time.perf_counter() - start < seconds:
        found.append(1e3 * first_call(run, device))
    return statistics.median(found)


def mask_ms(device: torch.device) -> tuple[float, int]:
    """Milliseconds and bytes of a mask for ``LONG_MASK`` tokens of a Mistral."""
    register()
    config = transformers.MistralConfig(sliding_window=1024)
    config._attn_implementation = "flexlocal"
    asked = inspect.signature(create_sliding_window_causal_mask).parameters
    cache = "cache" if "cache" in asked else "past_key_values"  # renamed after 5.17
    embeddings = torch.empty(1, LONG_MASK, 0, device=device)

    def run() -> Any:
        return create_sliding_window_causal_mask(
            config=config, inputs_embeds=embeddings, attention_mask=None, **{cache: None}
        )

    made = run()
    tensors = [x for x in vars(made).values() if isinstance(x, Tensor)]
    seconds = statistics.median(first_call(run, device) for _ in range(50))
    return 1e3 * seconds, sum(x.nbytes for x in tensors)


def measure(
    case: Case,
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    packs: bool = False,
) -> list[Any]:
    """A row for each implementation and input; nothing is timed where a result is wrong."""
    models = models_of(case, names, device, dtype)
    generator = torch.Generator(device).manual_seed(1)

    def drawn(shape: tuple[int, int]) -> dict[str, Any]:
        ids = torch.randint(3, 1024, shape, generator=generator, device=device)
        return packed(ids) if packs else {"input_ids": ids}

    off = checked(models, drawn(case.checked), dtype)
    right = {name for name, by in off.items() if not isinstance(by, str) and by <= 1}
    rows = []
    for shape in case.timed:
        given = drawn(shape)
        runs = {
            name: step_of(name, model, given) for name, model in models.items() if name in right
        }
        for name in list(runs):
            try:
                runs[name]()
            except Exception as error:
                off[name] = trouble(error)[1]
                del runs[name]
                torch.compiler.reset()
        synchronize(device)
        rounds = in_turns(runs, Timing(device, seconds), steps_ms)
        for name in models:
            rows.append(
                {
                    "shape": shape,
                    "implementation": name,
                    "off": off[name],
                    "ms": statistics.median(rounds[name]) if name in rounds else None,
                    "rounds": rounds.get(name),
                }
            )
    return rows


def text(rows: Sequence[Any]) -> str:
    """A table: milliseconds, and how many times as long as flexlocal."""
    lines = []
    for row in rows:
        base = next(x for x in rows if x["shape"] == row["shape"] and x["implementation"] == OURS)
        ratio = "-"
        if row["rounds"] and base["rounds"]:
            ratio = ratio_of_rounds(row["rounds"], base["rounds"]).words()
        off = row["off"] if isinstance(row["off"], str) else f"{row['off']:.2f}"
        shape = " x ".join(map(str, row["shape"]))
        lines.append([row["implementation"], shape, number(row["ms"]), ratio, off])
    titles = ["implementation", "input", "ms", "over flexlocal", "off, of what may be"]
    return table(titles, lines, titles[-1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    parser = reader("transformers_models", __doc__, seconds=2.0)
    names = [case.name for case in cases(tiny=True)]
    parser.add_argument("--model", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="small models")
    parser.add_argument("--short", action="store_true", help="512 tokens alone")
    parser.add_argument("--packed", action="store_true", help="documents in each row")
    words = f"those and {OURS} and {TRUTH}, which the others are compared with"
    known = list(IMPLEMENTATIONS)
    parser.add_argument(
        "--implementation", nargs="+", choices=known, default=known, metavar="NAME", help=words
    )
    options: argparse.Namespace = parser.parse_args(arguments)
    chosen = [name for name in known if name in {OURS, TRUTH, *options.implementation}]
    device = machine.default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = {"dtype": str(dtype), "seconds": options.seconds, "tiny": options.tiny}
    settings["packed"] = options.packed
    record = machine.record(device, **settings, transformers=transformers.__version__)
    record["models"] = []
    print(f"{record['device']}, torch {torch.__version__}, transformers {transformers.__version__}")
    transformers.logging.set_verbosity_error()
    wrong = False
    for case in cases(options.tiny):
        if case.name in options.model and not (options.packed and "BERT" in case.name):
            if options.short:
                case = replace(case, timed=case.timed[-1:])
            rows = measure(case, chosen, device, dtype, options.seconds, options.packed)
            wrong |= any(not isinstance(row["off"], str) and row["off"] > 1 for row in rows)
            wrong |= any(row["implementation"] == OURS and row["ms"] is None for row in rows)
            record["models"].append({"name": case.name, "rows": rows})
            print(f"\n{case.name}\n{text(rows)}", flush=True)
            machine.write(record, options.json)  # a later one may take the machine with it
    record["mask_ms"], record["mask_bytes"] = mask_ms(device)
    print(
        f"\na mask for {LONG_MASK} tokens: {record['mask_ms']:.3f} ms, {record['mask_bytes']} bytes"
    )
    machine.write(record, options.json)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
