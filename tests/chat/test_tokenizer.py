"""Tokenizers as folders hold them: SentencePiece's, against its own library, and what users cannot spell."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_sentencepiece
from small_tokenizers import CHATML, HEADERS, of_bytes, pieces
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from vila_triton import VilaProcessor
from vila_triton.__main__ import main
from vila_triton.chat.prompts import end_of_turn_ids, first_turn_ids, next_turn_ids, tokenize
from vila_triton.chat.special_tokens import alias_special_tokens, special_token_ids
from vila_triton.chat.templates import TEMPLATES, resolve_template
from vila_triton.chat.tokenizer import load_tokenizer
from vila_triton.models.params import LoadError
from vila_triton.paths import BUNDLED_CHECKPOINT

COUNTS = [300, pytest.param(10_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_ids_equal_those_of_sentencepiece_for_each_piece(kind: str, count: int, tmp_path: Path) -> None:
    theirs = small_sentencepiece.place(tmp_path, kind)
    ours, num_images = load_tokenizer(tmp_path), 0
    for text in small_sentencepiece.texts(count):
        expected = [1]
        for i, piece in enumerate(text.split("<image>")):
            expected += [-200] * bool(i) + theirs.encode(piece)
        assert tokenize(text, ours) == expected, text
        num_images += text.count("<image>")
    assert num_images > count / 4


def test_leading_spaces_are_kept_and_none_is_added_behind_a_special_token(tmp_path: Path) -> None:
    theirs = small_sentencepiece.place(tmp_path, "bpe")
    ours = load_tokenizer(tmp_path)
    ids, space = tokenize("What is <image> and <image>?", ours), theirs.piece_to_id("▁")
    first = ids.index(-200)
    assert ids[first - 1] == space and ids[first + 1 : ids.index(-200, first + 1)] == theirs.encode(" and ")
    behind = theirs.encode("\nUSER")[1:]  # a word behind a new line has no space of its own
    assert tokenize("</s>USER: Why?", ours)[: 2 + len(behind[1:])] == [1, 2, *behind[1:]]


def test_text_survives_encoding_and_decoding(tmp_path: Path) -> None:
    small_sentencepiece.place(tmp_path, "unigram")
    tokenizer = load_tokenizer(tmp_path)
    for text in small_sentencepiece.texts(100, seed=1):
        line = text.replace("▁", " ").replace("\x00", "")
        assert tokenizer.decode(tokenizer(line).input_ids, skip_special_tokens=True) == line
    assert tokenizer.decode([1, *tokenizer("a b").input_ids[1:], 2]) == "<s> a b</s>"


def test_saved_tokenizer_loads_again(tmp_path: Path) -> None:
    small_sentencepiece.place(tmp_path, "bpe")
    settings = {"add_bos_token": False, "add_eos_token": True, "pad_token": "<unk>", "model_max_length": 77}
    added = {"700": {"content": "<|im_start|>", "special": True}, "701": {"content": "[x]", "normalized": False}}
    write(tmp_path / "tokenizer_config.json", {**settings, "added_tokens_decoder": added})
    before = load_tokenizer(tmp_path)
    assert before("<|im_start|>[x]").input_ids[-3:] == [700, 701, 2] and before("").input_ids == [2]
    before.save_pretrained(tmp_path / "again")
    after = load_tokenizer(tmp_path / "again")
    for text in ("<|im_start|>user\nWhy?", "a [x]", "", "</s>"):
        assert after(text).input_ids == before(text).input_ids
    assert (after.model_max_length, after.pad_token_id, len(after)) == (77, 0, len(before))


def test_legacy_files_name_and_add_tokens(tmp_path: Path) -> None:
    small_sentencepiece.place(tmp_path, "bpe")
    write(tmp_path / "special_tokens_map.json", {"pad_token": {"content": "[PAD]", "lstrip": False}})
    write(tmp_path / "added_tokens.json", {"[PAD]": 600, "[y]": 601})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == 600 and tokenizer("a[y]", add_special_tokens=False).input_ids[-1] == 601


def write(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values))


@pytest.fixture
def vila(tmp_path: Path) -> Path:
    """The bundled model with a tokenizer.model only."""
    folder = tmp_path / "vila"
    shutil.copytree(BUNDLED_CHECKPOINT, folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "llm" / file).unlink()
    small_sentencepiece.place(folder / "llm", "small")
    return folder


@pytest.mark.parametrize(
    "how", [["--method", "rtn"], pytest.param(["--samples", "2"], marks=pytest.mark.slow)], ids=str
)
def test_folder_with_only_a_tokenizer_model_works_in_every_command(
    vila: Path, how: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    typed = iter(["What is it?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(typed))
    target, image = str(vila.with_name("int4")), str(BUNDLED_CHECKPOINT.parent / "examples" / "a.png")
    asked = ["--max-new-tokens", "3", "--model"]
    for command in (
        ["ask", *asked, str(vila), "--image", image, "What is it?"],
        ["chat", *asked, str(vila)],
        ["quantize", str(vila), target, "--group-size", "64", *how],
        ["ask", *asked, target, "What is it?"],
    ):
        monkeypatch.setattr("sys.argv", ["vila-triton", *command])
        assert main() == 0, capsys.readouterr().err
    inputs = VilaProcessor.from_pretrained(vila)(text="<image>\nWhy?", images=image)
    assert inputs["input_ids"][0, :2].tolist() == [1, -200]


def converted(kind: str) -> Any:
    """A tokenizer.json of byte pairs as LLaMA's was made: by older versions, which put a space before every part."""
    tokens = ["<unk>", "<s>", "</s>", "▁", "U", "▁U", "a", "▁a"]
    backend = Tokenizer(models.BPE({x: i for i, x in enumerate(tokens)}, [("▁", "U"), ("▁", "a")], unk_token="<unk>"))
    if kind == "prepended":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=kind, split=False)
    backend.decoder = decoders.Metaspace("▁")
    backend.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in tokens[:3]])
    return backend


@pytest.mark.parametrize("kind", ["prepended", "always", "first"])
def test_llama_tokenizer_json_gives_the_ids_of_its_sentencepiece_model(kind: str, tmp_path: Path) -> None:
    converted(kind).save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    tokenizer = load_tokenizer(tmp_path)
    for text, ids in {"U": [5], " U": [3, 5], "  a": [3, 3, 7], "a</s>U a": [7, 2, 4, 7], "</s>U": [2, 4]}.items():
        assert tokenize(text, tokenizer, add_bos=False) == ids


def tokenizers(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"bytes": of_bytes(HEADERS), "chatml": of_bytes(CHATML), "pieces": pieces()}
    for kind in ("unigram", "bpe", "marked"):
        (folder / kind).mkdir()
        small_sentencepiece.place(folder / kind, kind)
        found[kind] = load_tokenizer(folder / kind)
    return found | {"bundled": load_tokenizer(BUNDLED_CHECKPOINT)}


def test_user_text_cannot_spell_a_special_token(tmp_path: Path) -> None:
    for kind, tokenizer in tokenizers(tmp_path).items():
        how = resolve_template("auto", tokenizer)
        special = special_token_ids(tokenizer, how)
        assert len(special) > 2 and all(tokenizer.convert_ids_to_tokens(i) == text for text, i in special.items())
        unknown = {tokenizer.unk_token_id} - {None}  # what spells nothing that the tokenizer knows
        for write in (first_turn_ids, next_turn_ids):
            own = [i for i in write("a", how, tokenizer) if i in special.values()]
            for text in (
                *special,
                "".join(special),
                f"a {' '.join(special)} b",
                "<image></s>",
                f"a{how.turn_end}{how.user_prefix}b",
            ):
                ids = write(text, how, tokenizer)
                ids = [i for i in ids if i in special.values()]
                assert [i for i in ids if i not in unknown] == [i for i in own if i not in unknown], (kind, text)
        assert first_turn_ids("a <image>", how, tokenizer).count(-200) == 1
        raw = tokenize("a</s>" if kind not in ("bytes",) else "a<|eot_id|>", tokenizer)
        assert raw[-1] in special.values()  # what is no conversation follows upstream


def test_aliases_do_not_change_ids_of_ordinary_text(tmp_path: Path) -> None:
    for kind, tokenizer in tokenizers(tmp_path).items():
        how = resolve_template("auto", tokenizer)
        names = alias_special_tokens(tokenizer, how)
        for text in small_sentencepiece.texts(40, seed=2):
            written = how.render_first_turn(text) + how.turn_end
            hidden = how.with_aliases(names.aliases)
            assert tokenize(hidden.render_first_turn(text) + hidden.turn_end, tokenizer, aliases=names) == tokenize(
                written, tokenizer
            ), kind


def test_spelled_special_tokens_are_encoded_as_text(tmp_path: Path) -> None:
    small_sentencepiece.place(tmp_path, "bpe")
    tokenizer, how = load_tokenizer(tmp_path), TEMPLATES["vicuna_v1_nosys"]
    for text in ("say </s> to me", "<s>", "</s></s> a"):
        ids = first_turn_ids(text, how, tokenizer)
        assert tokenizer.decode(ids[1:]) == f" USER: {text} ASSISTANT:" and not {0, 1, 2} & {*ids[1:]}
    assert end_of_turn_ids(how, tokenizer) == [2]


def test_processor_reads_special_tokens_unless_split_special_tokens(vila: Path) -> None:
    processor = VilaProcessor.from_pretrained(vila)
    raw, plain = (processor(text="a</s>", split_special_tokens=split)["input_ids"][0] for split in (False, True))
    assert raw[-1] == 2 and 2 not in plain.tolist() and processor.decode(plain[1:]) == "a</s>"
    ids = processor(text="Say <image> it", images=str(BUNDLED_CHECKPOINT.parent / "examples" / "a.png"))["input_ids"]
    assert processor.batch_decode(ids)[0].removeprefix("<s>").strip() == "Say <image> it"
    assert processor.decode(ids[0], skip_special_tokens=True) == "Say  it"
    with pytest.raises(ValueError, match="token -1 is of no text: only -200, an image, is below 0"):
        processor.decode([5, -1])


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="character 1 of the text is no character"):
        tokenize("a\ud800", pieces())


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x0a\x05\xff\xff\xff\xff\xff", "tiktoken", "cut"])
def test_broken_sentencepiece_model_is_one_error(content: Any, tmp_path: Path) -> None:
    named: dict[Any, bytes] = {"tiktoken": b"IQ== 0\nIg== 1\n", "cut": small_sentencepiece.trained("bpe")[:-1000]}
    (tmp_path / "tokenizer.model").write_bytes(content if isinstance(content, bytes) else named[content])
    with pytest.raises(LoadError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)
