"""Files that a reader once took wrongly, by reader; they are tried at every run."""

DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

KNOWN: dict[str, tuple[bytes, ...]] = {
    "tuned table": (
        DEEP,
        b"\xff",
        b"[]",
        b'{"device": "Toy GPU", "entries": [5]}',
        b'{"device": ["Toy GPU"], "entries": []}',
        b'{"device": "Toy GPU", "choices": [], "entries": []}',
        b'{"device": "Toy GPU", "entries": [{"op": "int4_matmul", "impl": "gemv"}]}',
        b'{"device": "Toy GPU", "choices": {"int4_matmul": {"first": 9, "last": 1, "choice": "gemv"}}, "entries": []}',
    ),
    "tuner journal": (
        DEEP + b"\n",
        b'{"kind": []}\n',
        b'{"op": "int4_matmul", "impl": "gemv"}\n',
        b'{"kind": "search", "op": "int4_matmul", "impl": "gemv"}\n{"kind": "tune"}\n',
        b'{"kind": "search", "op": "int4_matmul", "impl": "gemv"}\n{"kind": "gated", "config": 1, "sizes": {}}\n',
    ),
    "shard journal": (DEEP, b"{}", b'{"key": 1}', b'{"key": "a", "done": 5}'),
    "calibration lines": (
        DEEP,
        b'{"text": "\\ud800"}',
        b'{"image": "a.png", "question": "<image> or <image>?"}',
        b'{"image": "%s", "question": "What?"}' % (b"a" * 5000),
    ),
}
