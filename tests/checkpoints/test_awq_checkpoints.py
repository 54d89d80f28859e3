"""AWQ checkpoints of other tools: dense linears, one group a row, and every form of quantization_config."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import build, pictures
from safetensors.torch import save_file
from torch import Tensor

from vila_triton import VilaLlamaForCausalLM as Model
from vila_triton.checkpoints.int4_layouts import AWQ_V1, AWQ_V2, Layout, pad_rows, scale_zeros
from vila_triton.checkpoints.int4_packing import pack_awq_gemm, pack_awq_gemv, pack_awq_v2
from vila_triton.checkpoints.int4_views import int4_linears
from vila_triton.checkpoints.loading import check_checkpoint, open_checkpoint
from vila_triton.checkpoints.tensor_files import open_tensors
from vila_triton.checkpoints.writing import write_checkpoint
from vila_triton.ops import Int4, dequantize
from vila_triton.ops.int4_tiles import pack_tiles
from vila_triton.ops.int4_weight import unpack_codes

LLM = {"hidden_size": 64, "intermediate_size": 192}
LEFT = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
ROWS = {64: 16, 192: 8, 256: 8}  # of scales that llm-awq stores for one group of so many inputs
VERSIONS = {"awq-gemm": "gemm", "awq-v1": "gemv", "awq-v2": "gemv_fast"}


def gemm(w: Int4) -> dict[str, Tensor]:
    zeros = pack_awq_gemm(w.zeros.T.int())
    return {"qweight": pack_awq_gemm(unpack_codes(w)), "qzeros": zeros, "scales": w.scales}


def v1(w: Int4) -> dict[str, Tensor]:
    rows = ROWS[w.shape[1]] if w.group_size == w.shape[1] else 32
    zeros = pack_awq_gemv(pad_rows(w.zeros.int(), rows).T)
    return {
        "qweight": pack_awq_gemv(unpack_codes(w)),
        "qzeros": zeros,
        "scales": pad_rows(w.scales, rows).T.contiguous(),
    }


def v2(w: Int4) -> dict[str, Tensor]:
    rows = ROWS[w.shape[1]] if w.group_size == w.shape[1] else 32
    shifts = pad_rows(scale_zeros(w.scales, w.zeros), rows)
    return {"qweight": pack_awq_v2(unpack_codes(w)), "scales": pad_rows(w.scales, rows), "qzeros": shifts}


WRITE = {"awq-gemm": gemm, "awq-v1": v1, "awq-v2": v2}


def awq(form: str, group: int, folder: Path) -> tuple[Path, Model]:
    """Write an AWQ checkpoint with three dense linears, and return it with the model that it holds."""
    order = "fma" if form == "awq-v2" else "sub"
    settings = {"quant_method": "vila-triton", "group_size": group, "order": order, "modules_to_not_convert": LEFT}
    model = build(dtype=torch.float16, llm=LLM | {"quantization_config": settings})
    model.save_pretrained(folder)
    tensors = dict(open_tensors(folder / "llm"))
    linears = int4_linears(tensors)
    assert len(linears) == 11 and not set(LEFT) & set(linears)
    for stem in linears:
        qweight, scales, zeros = (tensors.pop(f"{stem}.{leaf}") for leaf in ("qweight", "scales", "zeros"))
        k = 192 if "down" in stem else 64
        w = Int4(qweight, scales, zeros, k if group == -1 else group)
        tensors |= {f"{stem}.{leaf}": x for leaf, x in WRITE[form](w).items()}
    save_file({name: x.clone() for name, x in tensors.items()}, folder / "llm/model.safetensors")
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": VERSIONS[form]}
    edit(folder, **config, modules_to_not_convert=["down_proj"])
    return folder, model


def edit(folder: Path, **settings: Any) -> None:
    file = folder / "llm/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("form", WRITE)
@torch.no_grad()
def test_dense_linears_and_one_group_a_row_are_read(form: str, group: int, tmp_path: Path) -> None:
    folder, expected = awq(form, group, tmp_path / "x")
    model = Model.from_pretrained(folder, device="cpu")
    assert model.vila_config.llm.group_size == group and set(model.vila_config.llm.dense_linears) == set(LEFT)
    mine, theirs = model.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    ids, images = torch.tensor([[1, -200, 7, 8]]), pictures(model, 1)
    with_codes, written_out = (m(ids, images=images).logits for m in (model, twin(model)))
    torch.testing.assert_close(with_codes, written_out, rtol=0, atol=0.01)
    write_checkpoint(open_checkpoint(folder), tmp_path / "ours")
    again = Model.from_pretrained(tmp_path / "ours", device="cpu").state_dict()
    assert all(torch.equal(mine[name], again[name]) for name in mine)
    write_checkpoint(open_checkpoint(folder), tmp_path / "gemm", "awq-gemm")
    assert all(torch.equal(mine[n], x) for n, x in Model.from_pretrained(tmp_path / "gemm").state_dict().items())
    settings = json.loads((tmp_path / "gemm/llm/config.json").read_text())["quantization_config"]
    assert settings["group_size"] == group and set(settings["modules_to_not_convert"]) == set(LEFT)


def twin(model: Model) -> Model:
    """The same model with every int4 weight dequantized."""
    llm = model.params.llm
    values = dict(model.state_dict())
    for i, layer in enumerate(llm.layers):
        for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for name in names:
                if isinstance(w := getattr(layer, name).weight, Int4):
                    stem = f"llm.model.layers.{i}.{part}.{name}_proj"
                    for leaf in ("qweight", "scales", "zeros"):
                        del values[f"{stem}.{leaf}"]
                    values[f"{stem}.weight"] = dequantize(w, model.dtype)
    dense = build(dtype=model.dtype, llm=LLM)
    dense.load_state_dict(values)
    return dense


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return awq("awq-gemm", -1, tmp_path_factory.mktemp("awq") / "x")[0]


GOOD = {"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True, "version": "gemm"}
FINE: dict[str, Mapping[str, Any]] = {
    "as transformers 5 says it": {"format": "gemm", "backend": "auto", "version": None},
    "in capitals": {"version": "GEMM"},
    "for exllama": {"version": "exllama", "exllama_config": {"version": 2}},
    "fused": {"do_fuse": True, "modules_to_fuse": {"attention": ["q_proj"]}, "fuse_max_seq_len": 512},
    "llm-awq's words": {"q_group_size": -1, "w_bit": 4, "group_size": "", "bits": ""},
    "no version": {"version": None},
}


@pytest.mark.parametrize("change", FINE.values(), ids=FINE)
def test_quantization_configs_of_other_tools_are_read(change: Mapping[str, Any], folder: Path) -> None:
    edit(folder, **{key: value for key, value in {**GOOD, **change}.items() if value != ""})
    assert check_checkpoint(open_checkpoint(folder)).llm.group_size == -1


REFUSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq"}, "quantization 'gptq' is not supported"),
    "compressed tensors": ({"quant_method": "compressed-tensors"}, "'compressed-tensors' is not supported"),
    "a number": ({"quant_method": 4}, "quantization 4 is not supported"),
    "a list": ({"quant_method": ["awq"]}, r"quantization \['awq'\] is not supported"),
    "marlin": ({"version": "marlin"}, "in the layout awq-gemm, but the config says"),
    "llm-awq": ({"version": "llm-awq"}, "in the layout awq-gemm, but the config says"),
    "no group": ({"group_size": 0}, "group_size is 0, expected inputs, or -1 for all"),
    "groups of -2": ({"group_size": -2}, "group_size is -2, expected inputs, or -1 for all"),
    "groups in words": ({"group_size": "128"}, "group_size is '128', expected inputs"),
    "other groups": ({"group_size": 128}, "all int4 linears must be alike"),
    "eight bits": ({"bits": 8}, "8 bits, zero_point True is not supported"),
    "no bits": ({"bits": 0}, "0 bits, zero_point True is not supported"),
    "without zeros": ({"zero_point": False}, "4 bits, zero_point False is not supported"),
    "zeros in words": ({"zero_point": "yes"}, "4 bits, zero_point 'yes' is not supported"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_unsupported_awq_checkpoints_are_refused_in_one_sentence(
    change: Mapping[str, Any], message: str, folder: Path
) -> None:
    edit(folder, **{**GOOD, **change})
    with pytest.raises(ValueError, match=message) as error:
        check_checkpoint(open_checkpoint(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("layout", [AWQ_V1, AWQ_V2], ids=["awq-v1", "awq-v2"])
def test_padded_groups_are_not_read_as_smaller_groups(layout: Layout) -> None:
    """llm-awq's own .pt has no config: of its eight stored rows of scales, two may be real, or one."""
    rng = torch.Generator().manual_seed(0)
    scales, zeros = torch.rand(1, 16, generator=rng).half() + 0.5, torch.full((1, 16), 8.0).half()
    w = Int4(pack_tiles(torch.randint(0, 16, (16, 256), generator=rng)), scales, zeros, 256)
    leaves = (v1 if layout is AWQ_V1 else v2)(w)
    assert layout.read(leaves, -1).group_size == 256 and torch.equal(
        unpack_codes(layout.read(leaves, -1)), unpack_codes(w)
    )
    with pytest.raises(ValueError, match=r"1 of its 2 rows of scales are zero: .* not of 128; .*group_size"):
        layout.read(leaves, 0)
