"""`vila-triton serve` up to the start of vLLM: its errors, and the arguments of `vllm serve`."""

import json
import shutil
from pathlib import Path

import pytest

from vila_triton.__main__ import build_parser, main
from vila_triton.checkpoints.loading import check_checkpoint, open_checkpoint
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.vllm_plugin import server

CONFIG = check_checkpoint(open_checkpoint(BUNDLED_CHECKPOINT))


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The command where vLLM is installed, without its start: arguments -> exit code, stderr, arguments of vLLM."""
    started: list[list[str]] = []
    monkeypatch.setattr(server, "find_spec", lambda name: name)
    monkeypatch.setattr(server, "version", lambda name: server.TESTED_VERSIONS[0] + ".3")
    monkeypatch.setattr(server, "serve", started.append)

    def run(*args: str) -> tuple[int, str, list[str]]:
        started.clear()
        monkeypatch.setattr("sys.argv", ["vila-triton", "serve", *args])
        code = main()
        return code, capsys.readouterr().err, started[0] if started else []

    return run


def option(arguments: list[str], name: str) -> str:
    assert arguments.count(name) == 1
    return arguments[arguments.index(name) + 1]


def test_bundled_model_is_served_by_default(serve):
    code, err, arguments = serve()
    assert code == 0 and err.count("\n") == 1
    assert arguments[0] == str(BUNDLED_CHECKPOINT) and option(arguments, "--served-model-name") == "vila-tiny"
    assert option(arguments, "--host") == "127.0.0.1" and option(arguments, "--port") == "8000"
    assert option(arguments, "--max-model-len") == "4096" and option(arguments, "--dtype") == "auto"
    assert json.loads(option(arguments, "--limit-mm-per-prompt")) == {"image": 16}
    assert option(arguments, "--block-size") == "32"


def test_options_reach_vllm(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "m").symlink_to(BUNDLED_CHECKPOINT)
    options = ("--name", "n", "--host", "::1", "--port", "0", "--dtype", "float32", "--max-images", "3")
    discovered: list[str] = []
    monkeypatch.setattr("vila_triton.registry.discover", lambda *paths: discovered.extend(paths))
    monkeypatch.chdir(tmp_path)
    kernels = ("--max-body-mib", "5", "--kernels", "mine.py", "--set", "kernels.rope=triton", "--kernels", "more")
    _, _, arguments = serve(str(tmp_path / "m"), *options, *kernels, "--", "--block-size", "32", "--port=1", "--", "x")
    assert option(arguments, "--host") == "::1" and option(arguments, "--dtype") == "float32"
    assert option(arguments, "--served-model-name") == "n"
    config = json.loads(option(arguments, "--additional-config"))
    assert config["vila_triton"]["kernels"] == {"rope": "triton"} and discovered == ["mine.py", "more"]
    assert config["vila_triton"]["kernel_paths"] == [str(tmp_path / "mine.py"), str(tmp_path / "more")]
    assert config["vila_triton_server"] == {"max_body_mib": 5}
    assert arguments[-5:] == ["--block-size", "32", "--port=1", "--", "x"]


def test_name_of_a_model_is_its_folders(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(shutil.copytree(BUNDLED_CHECKPOINT, tmp_path / "my-vila"))
    assert option(serve(".")[2], "--served-model-name") == "my-vila"


def test_cache_on_a_cpu_holds_two_contexts_and_is_the_operators_choice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    settings = server.ServerSettings(BUNDLED_CHECKPOINT, "m", on_cpu=True)
    assert "--enforce-eager" in server.vllm_arguments(settings, CONFIG)
    assert option(server.vllm_arguments(settings, CONFIG), "--kv-cache-memory-bytes") == str(1 << 30)
    monkeypatch.setattr(server, "CPU_CACHE_BYTES", 0)
    token = 2 * 4 * 2 * 32  # keys and values, layers, heads, width
    assert server.cpu_cache_bytes(CONFIG, "float32") == 2 * 4096 * token * 4
    assert server.cpu_cache_bytes(CONFIG, None) == 2 * 4096 * token * 2
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert "--kv-cache-memory-bytes" not in server.vllm_arguments(settings, CONFIG)
    on_gpu = server.vllm_arguments(server.ServerSettings(BUNDLED_CHECKPOINT, "m", on_cpu=False), CONFIG)
    assert "--enforce-eager" not in on_gpu


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["--set", "kernels.rope=fast"], "there are: reference, triton"),
        (["--set", "kernels.nope=triton"], "no op 'nope'"),
        (["--set", "rope"], "expected kernels.OP=NAME"),
        (["--kernels", "nowhere.py"], "nowhere.py"),
        (["--", "--tokenizer_mode=hf"], "--tokenizer-mode of vLLM is made by vila-triton serve"),
        (["--", "--additional-config", "{}"], "--additional-config of vLLM is made by vila-triton serve"),
    ],
)
def test_wrong_arguments_are_one_line_before_vllm_is_imported(args: list[str], message: str, serve):
    code, err, arguments = serve(*args)
    assert code == 1 and message in err and err.count("\n") == 1 and not arguments


def test_without_vllm_one_line_says_how_to_install_it(serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    code, err, _ = serve()
    assert code == 1 and err.count("\n") == 1 and "not installed" in err and "vila_triton/vllm_plugin/README.md" in err


def test_another_version_of_vllm_is_refused(serve, monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        if name == "vllm":
            raise server.PackageNotFoundError(name)
        return "0.9.1"

    monkeypatch.setattr(server, "version", version)
    code, err, _ = serve()
    assert code == 1 and err.count("\n") == 1 and "needs vLLM 0.32, and 0.9.1 is installed" in err


@pytest.mark.parametrize("args", [["serve", "--port", "65536"], ["serve", "--max-images", "0"], ["serve", "a", "b"]])
def test_numbers_outside_of_their_limits_are_refused(args: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(args)
