"""Other libraries as implementations: found or not, converted once, refused a time if wrong. None is needed here:
stand-ins in a temporary folder have the interfaces that the libraries document."""

import gc
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch

from bench import peers
from bench.correctness.error_budget import example_args
from bench.correctness.gate import gate
from bench.correctness.guarded_memory import map_tensors
from bench.peers import __main__ as table
from bench.peers import _awq, _import_file, _offline
from bench.peers._cached_conversion import convert_once
from bench.peers._repage import repage
from vila_triton.ops import PagedKV, decode_attention, int4_matmul, prefill_attention
from vila_triton.ops.int4_weight import dequantize, unpack_codes
from vila_triton.registry import OPS, Unsupported

LIBRARIES = ("awq", "exllamav3", "flash_attn", "flashinfer", "gemlite", "gptqmodel", "lmdeploy", "sglang", "torchao")
AWQ = """
    import torch
    AWQ_TRITON_SUPPORTED_GROUP_SIZES = [32, 64, 128]

    def unpack(words):
        nibbles = words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15
        return nibbles[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(-2).double()

    def awq_gemm_triton(x, qweight, scales, qzeros, split_k_iters):
        wide = lambda y: y.double().repeat_interleave(len(qweight) // len(scales), 0)
        return (x.double() @ ((unpack(qweight) - wide(unpack(qzeros))) * wide(scales))).to(x.dtype)
"""
FLASH_ATTN = """
    import torch

    def attend(q, k, v, scale, causal=False):
        k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("shd,thd->hst", q.double(), k) * scale
        if causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[1:]).bool().tril(len(k) - len(q)), float("-inf"))
        return torch.einsum("hst,thd->shd", scores.softmax(-1), v).to(q.dtype)

    tokens = lambda pages, row, n: pages[row.long()].flatten(0, 1)[:n]

    flash_attn_func = lambda q, k, v, softmax_scale: torch.stack([attend(*x, softmax_scale) for x in zip(q, k, v)])

    def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale):
        assert k_cache.shape[1] % 256 == 0
        rows = zip(q, block_table, cache_seqlens)
        return torch.stack([attend(x, tokens(k_cache, r, n), tokens(v_cache, r, n), softmax_scale) for x, r, n in rows])

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, block_table
    ):
        assert k.shape[1] % 256 == 0 and causal
        assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
        chunks = zip(q.split(cu_seqlens_q.diff().tolist()), block_table, cu_seqlens_k.diff())
        return torch.cat([attend(x, tokens(k, r, n), tokens(v, r, n), softmax_scale, True) for x, r, n in chunks])
"""
FLASHINFER = """
    import torch
    import flash_attn

    class BatchDecodeWithPagedKVCacheWrapper:
        def __init__(self, workspace, layout, use_tensor_cores=False):
            assert layout == "NHD" and workspace.dtype == torch.uint8

        def plan(self, indptr, indices, last_page_len, h, g, d, page_size, q_data_type, kv_data_type, sm_scale):
            self.runs = [indices[a:b] for a, b in zip(indptr, indptr[1:])]
            self.lengths = [(len(run) - 1) * page_size + last for run, last in zip(self.runs, last_page_len)]
            self.starts, self.causal, self.scale = range(len(indptr)), False, sm_scale

        def run(self, q, pages):
            out = []
            for i, (run, n) in enumerate(zip(self.runs, self.lengths)):
                keys = (flash_attn.tokens(x, run, n) for x in pages)
                out.append(flash_attn.attend(q[self.starts[i] : self.starts[i + 1]], *keys, self.scale, self.causal))
            return torch.cat(out)

    class BatchPrefillWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
        def plan(self, starts, *paged, causal, **rest):
            super().plan(*paged, **rest)
            self.starts, self.causal = starts, causal
"""


@pytest.fixture(autouse=True)
def without_peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No library is installed, and what a test registers is gone after it."""
    for op in OPS.values():
        monkeypatch.setattr(op, "impls", dict(op.impls))
    for name in peers.peer_names():
        monkeypatch.delitem(sys.modules, f"bench.peers.{name}", raising=False)
    for library in LIBRARIES:
        monkeypatch.setitem(sys.modules, library, None)
    yield
    for name in peers.peer_names():
        sys.modules.pop(f"bench.peers.{name}", None)
        peers.__dict__.pop(name, None)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """install(file, text): the library in tmp_path to which the file belongs can be imported."""

    def write(file: str, text: str) -> None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(textwrap.dedent(text))
        monkeypatch.delitem(sys.modules, file.split("/")[0].removesuffix(".py"), raising=False)

    monkeypatch.syspath_prepend(tmp_path)
    return write


def int4(**sizes: Any) -> tuple:
    return example_args(
        int4_matmul, **{"seed": 0, "group": 32, "dtype": "float16", "order": "sub", "bias": False} | sizes
    )


def test_missing_libraries_give_reasons_and_no_implementations() -> None:
    before = {op.name: list(op.impls) for op in OPS.values()}
    reasons = peers.discover_peers()
    assert sorted([*reasons, "dense", "sdpa"]) == peers.peer_names() and len(reasons) == len(LIBRARIES)
    assert all(f"bench/peers/{name}.py says how to install it" in reason for name, reason in reasons.items())
    flash = {"sdpa_flash"}  # torch itself is always there
    own = {"int4_matmul": {"dense"}, "decode_attention": flash, "prefill_attention": flash | {"sdpa_cudnn"}}
    assert all({*op.impls} == {*before[op.name]} | own.get(op.name, set()) for op in OPS.values())


def test_failing_import_and_missing_gpu_give_reasons(install: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    install("gemlite/__init__.py", "raise RuntimeError('no such symbol\\nand more')")
    install("flash_attn.py", FLASH_ATTN)
    reasons = peers.discover_peers()
    assert reasons["gemlite"] == "import fails: RuntimeError: no such symbol"
    assert reasons["flash_attn"] == "flash-attn needs a CUDA GPU, and torch sees none"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in computes on the CPU")
@pytest.mark.parametrize("text, right", [(AWQ, True), (AWQ.replace("& 15", "& 7"), False)], ids=["right", "wrong"])
def test_peer_is_gated_like_any_implementation(text: str, right: bool, install: Callable, capsys, monkeypatch) -> None:
    install("awq/modules/triton/gemm.py", text)
    install("awq/__init__.py", "raise RuntimeError('the package itself is not imported')")
    assert "autoawq" not in peers.discover_peers()
    assert "awq" not in sys.modules  # what was borrowed is not taken for the library
    reason = gate(int4_matmul.impls["autoawq"], {})
    assert reason is None if right else reason and "off" in reason
    monkeypatch.setattr(sys, "argv", ["bench.peers", "autoawq", "torchao"])
    table.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["autoawq", f"  int4_matmul autoawq: {reason or 'right'}"]
    assert lines[2] == "torchao" and "bench/peers/torchao.py" in lines[3]


def test_unsupported_call_of_a_peer_is_refused_before_it_runs(install: Callable) -> None:
    install("awq/modules/triton/gemm.py", "AWQ_TRITON_SUPPORTED_GROUP_SIZES = [32]")
    peers.discover_peers()
    wrong = {"dtype": "float32", "group": 64, "bias": True, "order": "fma"}
    for (name, value), message in zip(wrong.items(), ("float32", "group is 64", "a bias", "not 'fma'"), strict=True):
        with pytest.raises(Unsupported, match=f"autoawq: .*{message}"):
            int4_matmul.impls["autoawq"](*int4(m=1, n=8, G=2, **{name: value}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins compute on the CPU")
@pytest.mark.parametrize("peer", ["flash_attn", "flashinfer"])
def test_attention_peers_are_called_as_documented(
    peer: str, install: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arguments mean to the library what they mean to us: a stand-in with its interface is faithful."""
    monkeypatch.setattr(_import_file, "require_cuda", lambda library: None)
    usual = _offline.check_tensors
    monkeypatch.setattr(_offline, "check_tensors", lambda *x, interpreted=True, **how: usual(*x, **how))
    install("flash_attn.py", FLASH_ATTN)
    install("flashinfer.py", FLASHINFER)
    assert peer not in peers.discover_peers()
    found = table.peer_impls(peer)
    assert {impl.op for impl in found} >= {"prefill_attention", "decode_attention"}
    assert {impl.op: gate(impl, {}) for impl in found} == {impl.op: None for impl in found}


def test_conversion_is_made_once_and_freed_with_its_source() -> None:
    made = []

    def convert(w, *rest, add=0):
        made.append(w.shape)
        return torch.ones(3) + add

    _, w, *_ = int4(m=1, n=8, G=1)
    result = convert_once(convert, w)
    assert convert_once(convert, w) is result and len(made) == 1
    assert convert_once(convert, w, add=1) is not result and convert_once(convert, w) is result and len(made) == 2
    assert convert_once(convert, replace(w)) is not result and len(made) == 3  # another weight
    first, other = torch.ones(1), torch.ones(1)
    with_first = convert_once(convert, w.scales, first)
    assert convert_once(convert, w.scales, first) is with_first
    assert convert_once(convert, w.scales, other) is not with_first  # equal, but not the same
    alive = ref(result)
    del result
    assert alive() is not None
    del w, with_first
    gc.collect()
    assert alive() is None


def test_awq_layout_equals_that_of_autoawq() -> None:
    _, w, *_ = int4(m=1, n=24, G=3)
    qweight, qzeros, scales = _awq.to_awq_layout(w, 8)
    assert unpack_codes(w).unique().tolist() == list(range(16))
    assert list(qweight.shape) == [96, 3] and list(qzeros.shape) == [3, 3] and torch.equal(scales, w.scales)
    for words, want in ((qweight, unpack_codes(w)), (qzeros, w.zeros.t())):
        nibbles = words[..., None] >> torch.arange(0, 32, 4, device=words.device) & 15
        assert torch.equal(nibbles[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1).t(), want.int())


def test_padding_adds_zeros_and_conversion_works_on_meta() -> None:
    _, w, *_ = int4(m=1, n=5, G=3)
    wide = _awq.pad_rows(w, 8)
    assert wide.shape == (8, 96) and wide.group_size == 32
    weight = dequantize(wide, torch.float16)
    assert torch.equal(weight[:5], dequantize(w, torch.float16)) and not weight[5:].any()
    meta = _awq.to_awq_layout(map_tensors(lambda x: x.to("meta"), wide), 8)
    assert [list(x.shape) for x in meta] == [
        list(x.shape) for x in _awq.to_awq_layout(wide, 8)
    ] and meta.qweight.is_meta


@pytest.mark.parametrize("length", [16, 256])
def test_repaged_pages_hold_the_same_tokens(length: int) -> None:
    sizes = {"b": 3, "s": 19, "t": 45, "g": 2, "ratio": 2, "d": 16, "l": 32, "dtype": "float32"}
    args = q, k, v, cache, batch, scale = example_args(prefill_attention, seed=0, **sizes)
    query_start, history = batch.query_start_loc, batch.context_lens
    made = repage(length, cache.k_pages, cache.v_pages, cache.block_table, history, k, v, query_start)
    assert made.seq_lens.tolist() == (history + query_start.diff()).tolist() and made.k_pages.shape[1] == length
    assert made.page_counts.tolist() == [max(1, -(-n // length)) for n in made.seq_lens.tolist()]
    last = query_start[1:].long() - 1  # the last token of each chunk sees all of its sequence, as in decode
    repaged = PagedKV(made.k_pages, made.v_pages, made.block_table())
    out = decode_attention.reference(q[last], repaged, made.seq_lens.to(q.device), scale)
    want = prefill_attention.reference(*args)[last]
    kept = query_start.diff() > 0
    assert kept.any() and torch.allclose(out[kept], want[kept], atol=1e-6)
    assert not torch.cat((made.k_pages, made.v_pages)).isnan().any()  # what no one may read did not come along


def test_fake_gpu_answers_a_launcher() -> None:
    asked = torch.cuda.get_device_properties
    with _offline.fake_gpu(torch.empty(1, device="meta")):
        assert (
            torch.cuda.get_device_capability() == (8, 0) and torch.cuda.get_device_properties(0).name == "NVIDIA A100"
        )
    assert torch.cuda.get_device_properties is asked
