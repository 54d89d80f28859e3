"""All that decides the kernels, together: `use`, a tuned table, the numerics, batches and chunks. In rows in which
every two of these meet, each call runs the implementation and the config that the rules say, and the logits are those
of the plain pass: within its error budget, or to the bit with batch-invariant numerics.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import build, padded, words
from plain_pass import plain_pass
from torch import Tensor

from bench.correctness.covering_array import Row, pairwise_rows
from bench.correctness.error_budget import check_within_budget, error_budget
from vila_triton import VilaLlamaForCausalLM, use
from vila_triton.hf.generation import CACHE_KEY
from vila_triton.paths import config_dir
from vila_triton.registry import OPS, Op, discover, tuned_tables

discover()
LLM = {"head_dim": 16, "intermediate_size": 64, "num_hidden_layers": 1}
INT4 = {"quantization_config": {"quant_method": "vila-triton", "group_size": 32}}
WEIGHTS: dict[str, dict[str, Any]] = {"dense": LLM, "int4": LLM | INT4}
PROMPTS = {"one": (5,), "several": (5, 1)}
DEFAULTS = tomllib.loads((config_dir() / "kernels.toml").read_text())["cpu"]
INVARIANT = {name: choice for name, choice in DEFAULTS.items() if isinstance(choice, str)} | DEFAULTS["batch_invariant"]
TRITON = ("linear", "rms_norm", "swiglu", "rope_kv_write", "prefill_attention", "decode_attention")
CHOICES: dict[str, dict[str, Any]] = {
    "reference": dict.fromkeys(OPS, "reference"),
    "triton": dict.fromkeys(TRITON, "triton"),
    "by size": {"linear": [[2, "triton"], "aten"], "rms_norm": [[8, "rowwise"], "triton"]},
}
AXES: dict[str, Sequence[Any]] = {
    "weights": tuple(WEIGHTS),
    "prompts": tuple(PROMPTS),
    "chunk_size": (None, 3),
    "numerics": ("fast", "batch_invariant"),
    "kv_dtype": (None, "int8"),
    "table": (None, "configs", "choices"),
    "use": (None, *CHOICES),
    "use_around": (None, "triton"),  # whose choices count where those inside name none
}
# A table: for an op the implementation it chooses with the last size it is for; by size, the number of the config.
TABLE: dict[str, tuple[str, int, dict[str, Any], int, int]] = {
    "linear": ("triton", 8, {"m": [0, 2]}, 1, 2),
    "rms_norm": ("triton", 10**6, {"rows": [0, 4]}, 1, 2),
    "swiglu": ("triton", 3, {"s": [0, 1]}, 1, 1),
    "prefill_attention": ("triton", 10**6, {"s": [0, 3]}, 2, 1),
    "decode_attention": ("simple", 10**6, {"b": [0, 1]}, 1, 2),
    "int4_matmul": ("splitk", 4, {"m": [0, 1]}, 1, 2),
}


def is_valid(row: Row) -> bool:
    """True unless the row asks for what is refused with batch-invariant numerics, or, with fast ones, rounds keys to
    codes: a number that rounds up here and down there is further off than any budget.
    """
    if row.get("numerics") == "batch_invariant":
        return row.get("use") not in ("reference", "by size")
    return not (row.get("numerics") == "fast" and row.get("kv_dtype"))


@lru_cache
def model_of(weights: str) -> VilaLlamaForCausalLM:
    return build(
        dtype=torch.float32, seed=3, gain=2.0, llm={"head_dim": 16, "intermediate_size": 64, **WEIGHTS[weights]}
    )


@lru_cache
def expected(weights: str, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """The exact logits [t, v] of a sequence, and the error that each may have."""
    model = model_of(weights)

    def plain(params: Any, x: Tensor) -> Tensor:
        return plain_pass(params, model.vila_config, x).logits

    embeddings = model.params.llm.embedding[words(length, seed=seed)].detach()
    exact, budget = error_budget(Op(plain, bitwise_exact=False), (model.params, embeddings))
    return exact[0], budget[0]


def write_table(folder: Path, chooses: bool) -> None:
    """Write a table for a device, with other configs than the first, and with choices of implementations."""
    entries, choices = [], {}
    for name, (impl_name, last, sizes, small, large) in TABLE.items():
        impl = OPS[name].impls[impl_name]
        tuned_at = dict.fromkeys(OPS[name].dynamic_sizes, 1)
        first = {"sizes": sizes, "tuned_at": tuned_at, "config": dict(impl.configs[small]), "seconds": 1e-5}
        otherwise = {"config": dict(impl.configs[large])}
        fingerprint = tuned_tables.entry_fingerprint(impl)
        entries.append({"op": name, "impl": impl_name, **fingerprint, "ranges": [first], "otherwise": otherwise})
        choices[name] = {"first": 1, "last": last, "choice": impl_name}
    table = {"device": "Toy", "choices": choices if chooses else {}, "entries": entries}
    (folder / "toy.json").write_text(json.dumps(table))


def forget_tables() -> None:
    for cached in (tuned_tables.load_table, tuned_tables.valid_entry, tuned_tables.tuned_config_at):
        cached.cache_clear()
    tuned_tables.table_choice.cache_clear()


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the tables of a device that calls are taken to run on."""
    monkeypatch.setattr(tuned_tables, "tables_dir", lambda: tmp_path)
    monkeypatch.setattr(tuned_tables, "gpu_name", lambda device: "Toy")
    forget_tables()
    yield tmp_path
    forget_tables()


Call = tuple[str, str, dict[str, Any], dict[str, Any]]  # op, implementation, sizes, config


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls of ops that run from here on."""
    ran: list[Call] = []

    def recorded(op: Op, name: str) -> Any:
        fn, keys = op.impls[name].fn, op.impls[name].configs[0].keys()

        def run(*args: Any, **kwargs: Any) -> Any:
            config = {key: kwargs[key] for key in keys}
            sizes = (
                op.sizes_of(*args, **{key: x for key, x in kwargs.items() if key not in keys}) if op.sizes_of else {}
            )
            ran.append((op.name, name, sizes, config))
            return fn(*args, **kwargs)

        return run

    for op in OPS.values():
        for name, impl in op.impls.items():
            monkeypatch.setitem(op.impls, name, replace(impl, fn=recorded(op, name)))
    return ran


def at_sizes(choice: Any, size: int, sizes: Mapping[str, Any]) -> str:
    """The name that a choice, one name, ranges or cases before them, has for a call."""
    if isinstance(choice, str):
        return choice
    if isinstance(choice[0], dict):
        case, *others = choice
        fits = all(sizes[name] == x or sizes[name] in list(x) for name, x in case.items() if name != "run")
        return at_sizes(case["run"] if fits else others, size, sizes)
    return next((name for last, name in choice[:-1] if size <= last), choice[-1])


def expected_call(row: Row, name: str, sizes: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The implementation of an op that runs for these sizes, and its config, by the rules of README."""
    size = sizes[OPS[name].dynamic_sizes[0]]
    explicit = CHOICES.get(row["use_around"], {}) | CHOICES.get(row["use"], {})
    invariant = row["numerics"] == "batch_invariant"
    chosen = (INVARIANT if invariant else DEFAULTS).get(name, "reference")
    if row["table"] == "choices" and not invariant and name in TABLE and 1 <= size <= TABLE[name][1]:
        chosen = TABLE[name][0]
    impl = OPS[name].impls[at_sizes(explicit.get(name, chosen), size, sizes)]
    if row["table"] is None or invariant or name not in TABLE or TABLE[name][0] != impl.name:
        return impl.name, dict(impl.configs[0])
    _, _, ranges, small, large = TABLE[name]
    ((key, (_, last)),) = ranges.items()
    return impl.name, dict(impl.configs[small if sizes[key] <= last else large])


def logits_of(model: VilaLlamaForCausalLM, rows: Sequence[Tensor], chunk_size: int | None) -> list[Tensor]:
    """The logits [t, v] of each row [t]: of all tokens but the last in one call, and of this in another."""
    ids, mask = padded([row[:-1].tolist() for row in rows])
    model.config.prefill_chunk_size = chunk_size or 512
    first = model(ids, attention_mask=mask, chunk_prefilling=chunk_size is not None)
    then = model(torch.stack([row[-1:] for row in rows]), past_key_values=first[CACHE_KEY])
    return [torch.cat((a[: len(row) - 1], b)) for row, a, b in zip(rows, first.logits, then.logits)]


@pytest.mark.parametrize("row", list(pairwise_rows(AXES, is_valid=is_valid)))
@torch.no_grad()
def test_each_call_runs_what_the_rules_say_and_logits_are_those_of_the_plain_pass(
    row: Row, device: Path, calls: list[Call], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model = model_of(row["weights"])
    monkeypatch.setattr(model.config, "attention_numerics", row["numerics"])
    monkeypatch.setattr(model.config, "kv_dtype", row["kv_dtype"])
    lengths = PROMPTS[row["prompts"]]
    rows = [words(n + 1, seed=i) for i, n in enumerate(lengths)]
    with use(**CHOICES.get(row["use_around"], {})), use(**CHOICES.get(row["use"], {})):
        if row["numerics"] == "batch_invariant":  # alone, whole and without a table
            request.getfixturevalue("dots_in_order")
            alone = [logits_of(model, [tokens], None)[0] for tokens in rows]
            calls.clear()
        if row["table"]:
            write_table(device, chooses=row["table"] == "choices")
            forget_tables()
        found = logits_of(model, rows, row["chunk_size"])
    for name, impl, sizes, config in calls:
        assert (impl, config) == expected_call(row, name, sizes), (name, sizes)
    assert {name for name, *_ in calls} >= {"linear", "rms_norm", "prefill_attention"}
    for i, logits in enumerate(found):
        if row["numerics"] == "batch_invariant":
            assert torch.equal(logits, alone[i])
        else:
            check_within_budget(0, logits, *expected(row["weights"], len(rows[i]), i))


@torch.no_grad()
def test_stale_table_is_an_error_unless_use_or_the_numerics_leave_it_aside(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = model_of("dense"), words(1, 5)
    write_table(device, chooses=True)
    file = device / "toy.json"
    file.write_text(file.read_text().replace(tuned_tables.kernel_hash(OPS["rms_norm"].impls["triton"]), "0" * 8))
    with pytest.raises(tuned_tables.StaleTableError, match=r"rms_norm triton: the tuned table toy\.json is stale"):
        model(ids, start_pos=0)
    assert model.cache is None
    with use(rms_norm="rowwise"):
        model(ids)
    with use(rms_norm="triton"), pytest.raises(tuned_tables.StaleTableError):  # its config is in the table, too
        model(ids)
    monkeypatch.setattr(model.config, "attention_numerics", "batch_invariant")
    model(ids)
    with use(rms_norm="triton"):
        model(ids)
