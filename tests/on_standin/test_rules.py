"""The stand-in refuses, counts and computes as CUDA does."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bench import standin

if standin.is_active():
    from bench.standin import device
    from bench.standin.counts import counting


@triton.jit
def add_one_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) + 1, mask=offs < n)


def add_one(x: Tensor, grid: Any = (1,)) -> Tensor:
    y = torch.empty_like(x)
    add_one_kernel[grid](x, y, x.numel(), BLOCK=16)  # pyright: ignore
    return y


def ones(*shape: int, **kwargs: Any) -> Tensor:
    return torch.ones(*shape, device="cuda", **kwargs)


def test_tensors_report_and_keep_their_device() -> None:
    x = ones(2, 3)
    derived = [x + 1, x[0], x.new_empty(2), torch.cat([x, x]), torch.empty_like(x), x.half(), x.view(6), x.T]
    derived += [torch.tensor([1.0], device="cuda"), torch.as_tensor([1.0], device=x.device), torch.ones(2).to(x)]
    with torch.device("cuda"):
        derived += [torch.zeros(2), torch.tensor(1)]
    assert all(y.device == torch.device("cuda", 0) and y.is_cuda for y in derived)
    assert x.cpu().device.type == "cpu" and (x + 1).cpu().tolist() == [[2.0] * 3] * 2


def test_inplace_operator_writes_memory_shared_with_views() -> None:
    x = ones(4)
    with torch.inference_mode():
        x[1:].mul_(3)
    assert x.tolist() == [1, 3, 3, 3]


def test_gradients_cross_devices() -> None:
    x = torch.ones(3, requires_grad=True)
    (x.cuda() * 2).cpu().sum().backward()
    assert x.grad is not None and not x.grad.is_cuda and x.grad.tolist() == [2, 2, 2]


def test_other_threads_run_on_the_stand_in() -> None:
    places: list[torch.device] = []
    thread = threading.Thread(target=lambda: places.append(torch.zeros(2, device="cuda").device))
    thread.start()
    thread.join()
    assert places == [torch.device("cuda", 0)]


def test_saved_tensor_is_read_on_the_cpu(tmp_path: Path) -> None:
    torch.save({"x": ones(3)}, tmp_path / "x.pt")
    held = torch.load(tmp_path / "x.pt", map_location="cpu", weights_only=True)["x"]
    assert not held.is_cuda and held.tolist() == [1, 1, 1]


def test_integers_of_a_graph_are_invalid_before_replay() -> None:
    x = ones(3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = x.argmax()
    assert token.item() < 0
    graph.replay()
    assert token.item() == 0


def test_gradients_are_those_of_the_cpu() -> None:
    w = ones(3).requires_grad_()
    (w * w).sum().backward()
    assert w.grad is not None and w.grad.is_cuda and w.grad.tolist() == [2, 2, 2]


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "operands of two devices": (lambda: ones(2) + torch.ones(2), RuntimeError, "two devices, cuda:0 and cpu"),
    "operands of two GPUs": (lambda: ones(2) + torch.ones(2, device="cuda:1"), RuntimeError, "cuda:1 and cuda:0"),
    "a joined number": (lambda: torch.stack([ones(1)[0], torch.ones(())]), RuntimeError, "two devices"),
    "a generator of the CPU": (
        lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
        RuntimeError,
        "Expected a 'cuda' device type for generator but found 'cpu'",
    ),
    "a generator of the GPU": (
        lambda: torch.rand(2, generator=torch.Generator("cuda")),
        RuntimeError,
        "Expected a 'cpu' device type for generator but found 'cuda'",
    ),
    "indices of a GPU into a tensor of the CPU": (
        lambda: torch.arange(4)[ones(2, dtype=torch.int64)],
        RuntimeError,
        "indices should be either on cpu or on the same device",
    ),
    "a place of a GPU in a tensor of the CPU": (
        lambda: torch.zeros(4).index_put_((ones(2, dtype=torch.int64),), torch.ones(2)),
        RuntimeError,
        "indices should be either on cpu or on the same device",
    ),
    "a product of whole numbers": (
        lambda: ones(2, 2, dtype=torch.int64) @ ones(2, 2, dtype=torch.int64),
        RuntimeError,
        "not implemented for 'torch.int64'",
    ),
    "numpy": (lambda: ones(2).numpy(), TypeError, "can't convert cuda:0"),
    "a device there is not": (lambda: torch.ones(2, device="cuda:7"), RuntimeError, "invalid device ordinal"),
    "an operator of CPUs": (
        lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(ones(1, 32), ones(1, 1).int(), 32, ones(1, 1, 2)),
        NotImplementedError,
        "from the 'CUDA' backend",
    ),
    "a tensor of the CPU in a kernel": (lambda: add_one(torch.ones(4)), ValueError, "cannot be accessed from Triton"),
    "a kernel on another device": (
        lambda: add_one(torch.ones(4, device="cuda:1")),
        ValueError,
        "is on cuda:1, but the current device is cuda:0",
    ),
    "a grid of too many blocks along x": (lambda: add_one(ones(4), (2**31,)), RuntimeError, "invalid argument"),
    "along y": (lambda: add_one(ones(4), (1, 65536)), RuntimeError, "invalid argument"),
    "along z": (lambda: add_one(ones(4), (1, 1, 65536)), RuntimeError, "invalid argument"),
    "a grid of four axes": (lambda: add_one(ones(4), (1, 1, 1, 1)), RuntimeError, "invalid argument"),
    "a time of events not made for it": (
        lambda: torch.cuda.Event().elapsed_time(torch.cuda.Event(enable_timing=True)),
        RuntimeError,
        "enable_timing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_cuda_refuses(name: str) -> None:
    call, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        call()


def test_grids_of_three_axes_and_empty_grids_run() -> None:
    assert add_one(ones(4), (1, 2, 3)).tolist() == [2] * 4
    assert add_one(ones(4), lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)).tolist() == [2] * 4
    add_one(ones(4), (0, 1))


def test_kernel_runs_on_the_current_device() -> None:
    with torch.cuda.device(1):
        y = add_one(torch.ones(4, device="cuda"))
    assert y.device == torch.device("cuda", 1) and y.tolist() == [2] * 4
    assert torch.cuda.current_device() == 0


def test_cpu_numbers_and_indices_are_accepted() -> None:
    x = ones(3)
    assert (x * torch.tensor(2.0)).tolist() == [2] * 3
    assert x[torch.tensor([0, 1])].tolist() == [1, 1]


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item()": lambda x: x[0].item(),
    "tolist()": lambda x: x.tolist(),
    "a copy to the CPU": lambda x: x.cpu(),
    "a copy of pageable memory to the device": lambda x: torch.tensor([1.0], device=x.device),
    "nonzero": lambda x: x.nonzero(),
    "indexing by a mask": lambda x: x[x > 0],
    "torch.allclose": lambda x: torch.allclose(x, x),
    "torch.equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "repeat_interleave without output_size": lambda x: x.repeat_interleave(x.int()),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("what", WAITS)
def test_waits_are_counted_by_line_and_refused_in_a_capture(what: str) -> None:
    x = ones(3)
    with counting() as counts:
        WAITS[what](x)
    assert {(kind, file.split(":")[0]) for kind, file in counts.waits} >= {(what, "tests/on_standin/test_rules.py")}
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            WAITS[what](x)


def test_operators_that_do_not_wait_are_not_counted() -> None:
    x = ones(3)
    with counting() as counts:
        x.add_(1).softmax(0).argmax()
        x.repeat_interleave(2)
        add_one(x)
    assert not counts.waits


def test_graph_replay_computes_on_its_present_inputs() -> None:
    x, total = ones(4), torch.zeros(4, device="cuda")
    add_one(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = add_one(x * 2)
        total.add_(y)
    assert total.tolist() == [0] * 4
    assert (y * 0).isnan().any() or y.tolist() != [3] * 4  # nothing has been computed yet
    graph.replay()
    assert y.tolist() == [3] * 4 and total.tolist() == [3] * 4
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [11] * 4 and total.tolist() == [14] * 4


def test_capture_leaves_tensors_behind_views_alone() -> None:
    x = ones(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        views = [x.detach(), x.data, x[1:], x.view(2, 2)]
        low, _ = (views[0] * 2).min(0)
    assert x.tolist() == [1] * 4 and low.isnan()


def test_tensor_moves_to_a_device_given_as_a_number() -> None:
    assert torch.ones(1).cuda(1).device == ones(1).cuda(1).device == torch.device("cuda", 1)


def test_kernels_to_compile_are_counted_once_per_specialization() -> None:
    with counting() as counts:
        for n in (16, 32, 7, 9, 1):  # divisible by 16 twice, neither twice, and the constant 1
            add_one(ones(n))
        add_one(ones(16, dtype=torch.float16))
    assert counts.launches["add_one_kernel"] == 6
    assert len(counts.compiled) == 4


def test_division_by_a_number_multiplies_with_its_reciprocal() -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    ours = (x.cuda() / 127).cpu()
    assert torch.equal(ours, x * (torch.ones(()) / 127)) and not torch.equal(ours, x / 127)
    assert torch.equal((x.cuda() / torch.full((), 127.0, device="cuda")).cpu(), x / 127)
    assert torch.equal(x.cuda().div_(127).cpu(), ours)
    for number in (0.3, 3.3, 1e-5):  # which float32 does not hold exactly
        assert torch.equal((x.cuda() / number).cpu(), x * (1 / torch.tensor(number)))
    assert (ones(2) / 0).tolist() == [float("inf")] * 2


def test_device_memory_is_counted_and_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.empty(1000, device="cuda")
    held = [x[1:], x.view(10, 100)]
    assert torch.cuda.memory_allocated() == before + 4000
    del x, held
    assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() == before + 4000
    monkeypatch.setattr(device.memories[0], "total", before + 4000)
    torch.empty(4000, dtype=torch.int8, device="cuda")
    for size in (4001, 2**48):
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.empty(size, dtype=torch.int8, device="cuda")
    assert torch.cuda.memory_allocated() == before
