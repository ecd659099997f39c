"""Tokenizers in GGUF files: the same tokens in llama.cpp (golden), in transformers' reader and by scores alone; damaged ones are named."""

import hashlib
import json
import logging
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from qkernels import io
from qkernels.errors import CheckpointError
from qkernels.io import gguf_file, gguf_text, gguf_tokenizer
from qkernels.io.convert import NO_TOKENIZER, convert

GOLDEN = json.loads((Path(__file__).parent / "golden" / "gguf_tokenizers.json").read_text())
TEXTS, TOKENIZERS = GOLDEN["texts"], GOLDEN["tokenizers"]
BYTE_LEVEL = [name for name in TOKENIZERS if not name.startswith("llama ")]
OF_CHARACTERS = ["llama prepend", "llama first", "llama never"]
SPECIAL = GOLDEN["tokenizer_config.json"]
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def said(name="gpt-2"):
    """A tokenizer.json, to be changed."""
    return json.loads(json.dumps(TOKENIZERS[name]["tokenizer.json"]))


def made(path, tokenizer=None, size=None, **files):
    """The key-values of a directory with these files, by their names without .json."""
    files = {"tokenizer": said() if tokenizer is None else tokenizer, "tokenizer_config": SPECIAL, **files}
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return gguf_tokenizer.key_values(path, {} if size is None else {"vocab_size": size})


def ids_of(tokenizer):
    backend = Tokenizer.from_str(json.dumps(tokenizer))
    return [backend.encode(text).ids for text in TEXTS]


def converted(path, tokenizer, more=3, **files):
    """A GGUF file of a model with this tokenizer, and the report; the model has some more tokens."""
    count = Tokenizer.from_str(json.dumps(tokenizer)).get_vocab_size() + more
    with io.directory.Writer(path / "model") as writer:
        writer.add("model.embed_tokens.weight", torch.randn(count, 32))
        writer.config = CONFIG | {"vocab_size": count}
    made(path / "model", tokenizer, **files)
    return path / "m.gguf", convert(path / "model", path / "m.gguf", "gguf:Q4_0")


# -- the same tokens -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *OF_CHARACTERS])
def test_llama_cpp_makes_the_same_tokens(tmp_path, caplog, name):
    """These key-values were given to llama.cpp, whose tokens lie in the golden file."""
    found = made(tmp_path, said(name))
    assert found["tokenizer.ggml.pre"] == ("default" if name in OF_CHARACTERS else name) and not caplog.records
    assert hashlib.sha256(b"".join(gguf_file.pack(found))).hexdigest() == TOKENIZERS[name]["sha256"]
    other = [text for text, ours, theirs in zip(TEXTS, ids_of(said(name)), TOKENIZERS[name]["tokens"]) if ours != theirs]
    # where a space is put before the first word alone, and not if one is there, llama.cpp puts it there nevertheless, and behind specials
    assert other == ([t for t in TEXTS if t.startswith(" ") or "</s>" in t] if name == "llama first" else [])


# what transformers' reader makes otherwise than tokenizer.json: it cuts no digits, and has the spaces of "llama first" in any case
OTHERWISE = {"smollm": r"\d\d", "llama prepend": "^ |</s>"}


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "llama first", "llama prepend"])
def test_transformers_reads_the_same_tokenizer(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    _, report = converted(tmp_path, said(name))
    assert report.notes == []
    read = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert (read.bos_token, read.eos_token) == ("<s>", "</s>")
    pairs = [(text, ids) for text, ids in zip(TEXTS, ids_of(said(name))) if not re.search(OTHERWISE.get(name, "^$"), text)]
    assert len(pairs) > 10
    for text, (bos, *ids) in pairs:
        assert bos == read.bos_token_id and read(text, add_special_tokens=False).input_ids == ids, text


def merged_by_score(text, found):
    """Tokens as SentencePiece and llama.cpp make them: of neighbours that make a token, those of the highest score first, from the left."""
    tokens, scores = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"]
    score, parts = dict(zip(tokens, scores)), list(text)
    while candidates := [(-score[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in score]:
        _, i = min(candidates)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = {token: id for id, token in enumerate(tokens)}
    return [id for part in parts for id in ([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])]


def test_scores_merge_in_the_order_of_merges(tmp_path, caplog):
    found = made(tmp_path, said("llama prepend"))
    backend = Tokenizer.from_str(json.dumps(said("llama prepend")))
    texts = [text for text in TEXTS if text and "<" not in text] + [(Path(__file__).parents[1] / "README.md").read_text()[:3000]]
    for text in texts:
        expected = backend.encode(text, add_special_tokens=False).ids
        assert merged_by_score("▁" + text.replace(" ", "▁"), found) == expected, text
    assert not caplog.records


def test_merges_that_scores_cannot_say_are_logged(tmp_path, caplog):
    found = made(tmp_path, said("llama of learnt pairs"))
    assert "make a token and are no merge" in caplog.text and found["tokenizer.ggml.model"] == "llama"
    other = [ours != theirs for ours, theirs in zip(ids_of(said("llama of learnt pairs")), TOKENIZERS["llama of learnt pairs"]["tokens"])]
    assert any(other)
    caplog.clear()
    apart = said("llama prepend")
    first = apart["model"]["merges"]
    first.append(first.pop(next(i for i, (a, b) in enumerate(first) if sum(c + d == a + b for c, d in first) > 1)))
    made(tmp_path, apart)
    assert "merges of a token lie apart" in caplog.text


# -- what is written -----------------------------------------------------------------------------------------------------------------


def test_types_of_key_values(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs gguf-py, which reads the file")
    V = gguf.GGUFValueType
    for name in ("gpt-2", "llama prepend"):
        (tmp_path / name).mkdir()
        path, _ = converted(tmp_path / name, said(name), chat_template={}, generation_config={})
        fields = gguf.GGUFReader(path).fields
        expected = {
            "model": [V.STRING],
            "pre": [V.STRING],
            "tokens": [V.ARRAY, V.STRING],
            "token_type": [V.ARRAY, V.INT32],
            "merges": [V.ARRAY, V.STRING],
            "bos_token_id": [V.UINT32],
            "eos_token_id": [V.UINT32],
            "unknown_token_id": [V.UINT32],
            "add_bos_token": [V.BOOL],
            "add_eos_token": [V.BOOL],
        }
        expected |= {"scores": [V.ARRAY, V.FLOAT32], "add_space_prefix": [V.BOOL]} if name != "gpt-2" else {}
        assert {key.removeprefix("tokenizer.ggml."): f.types for key, f in fields.items() if key.startswith("tokenizer.")} == expected
        count = fields["llama.vocab_size"].contents()
        assert len(fields["tokenizer.ggml.tokens"].contents()) == len(fields["tokenizer.ggml.token_type"].contents()) == count


def test_types_of_tokens(tmp_path):
    tokenizer = said("llama prepend")
    count = len(tokenizer["model"]["vocab"]) + 1  # and <tool>
    found = made(tmp_path, tokenizer, count + 2)
    tokens, types, scores = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores"))
    assert (tokens[-2:], types[-2:]) == ([f"[PAD{count}]", f"[PAD{count + 1}]"], [5, 5])
    assert dict(zip(tokens, types)).items() >= {"<unk>": 2, "<s>": 3, "</s>": 3, "<tool>": 4, "<0x41>": 6, "▁▁": 1}.items()
    assert min(scores) == dict(zip(tokens, scores))["<s>"] < dict(zip(tokens, scores))["▁▁"] < 0
    tokens, types = (made(tmp_path)[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    assert dict(zip(tokens, types)).items() >= {"<unk>": 3, "</s>": 3, "<tool>": 4, "Ġ": 1}.items()


def test_special_tokens(tmp_path):
    """A token that a file names comes before an id that one states; -1 and the like are none; what puts bos there is the post-processor."""
    stated = {"eos_token_id": [7, 8], "bos_token_id": 5, "pad_token_id": -1}
    found = made(tmp_path, tokenizer_config={}, special_tokens_map={"bos_token": {"content": "<s>"}}, generation_config=stated)
    special = {key.removeprefix("tokenizer.ggml."): value for key, value in found.items() if "token_" in key or "add_" in key}
    special.pop("token_type")
    bos = said()["added_tokens"][1]["id"]
    assert special == {"bos_token_id": bos, "eos_token_id": 7, "add_bos_token": True, "add_eos_token": False}
    found = made(tmp_path, tokenizer_config=SPECIAL | {"add_bos_token": False, "add_eos_token": True, "pad_token": "</s>"})
    assert not found["tokenizer.ggml.add_bos_token"] and found["tokenizer.ggml.add_eos_token"]
    assert found["tokenizer.ggml.padding_token_id"] == found["tokenizer.ggml.eos_token_id"] == bos + 1


def test_special_tokens_that_llama_cpp_does_not_put_there(tmp_path, caplog):
    tokenizer = said()
    tokenizer["post_processor"]["single"][0]["SpecialToken"]["id"] = "<unk>"
    found = made(tmp_path, tokenizer)
    assert not found["tokenizer.ggml.add_bos_token"] and "no token around text but bos and eos, and the tokenizer '<unk>'" in caplog.text
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, said()["post_processor"]]}
    assert made(tmp_path, tokenizer)["tokenizer.ggml.add_bos_token"]
    alone = made(tmp_path, tokenizer, tokenizer_config={})
    assert alone["tokenizer.ggml.add_bos_token"] and alone["tokenizer.ggml.tokens"][alone["tokenizer.ggml.bos_token_id"]] == "<s>"
    del tokenizer["post_processor"]
    alone = made(tmp_path, tokenizer, tokenizer_config={"add_bos_token": True})  # and no bos
    assert not alone["tokenizer.ggml.add_bos_token"] and "tokenizer.ggml.bos_token_id" not in alone


def test_chat_templates(tmp_path):
    two = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    found = made(tmp_path, tokenizer_config=SPECIAL | {"chat_template": two})
    assert (found["tokenizer.chat_template"], found["tokenizer.chat_template.tool_use"]) == ("A", "B")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}é")
    assert made(tmp_path, tokenizer_config=SPECIAL | {"chat_template": "A"})["tokenizer.chat_template"] == "{{ messages }}é"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"cannot read .*chat_template\.jinja"):
        made(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="chat_template lacks template"):
        made(tmp_path, tokenizer_config={"chat_template": [{"name": "default"}]})


def test_a_tokenizer_goes_from_gguf_to_gguf(tmp_path):
    path, _ = converted(tmp_path, said("llama prepend"), tokenizer_config=SPECIAL | {"chat_template": "A"})
    assert convert(path, tmp_path / "again.gguf", "gguf:Q8_0", requantize=True).notes == []
    before, after = (
        {key: value for key, value in io.detect(file).settings.items() if key.startswith("tokenizer.")}
        for file in (path, tmp_path / "again.gguf")
    )
    assert (
        before == after
        and before["tokenizer.chat_template"] == "A"
        and io.detect(tmp_path / "again.gguf").settings.types["tokenizer.ggml.scores"] == "[f32]"
    )


# -- what llama.cpp does otherwise, and what it cannot hold --------------------------------------------------------------------------

REGEX = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
LLAMA3 = TOKENIZERS["llama-bpe"]["tokenizer.json"]["pre_tokenizer"]["pretokenizers"][0]


@pytest.mark.parametrize(
    ("changes", "pre", "logged"),
    [
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [REGEX, BYTES]}}, "default", r"Split x, ByteLevel False\. 'default' is"),
        ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "default", "ByteLevel with add_prefix_space"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [LLAMA3 | {"behavior": "Removed", "invert": True}, BYTES]}},
            "smaug-bpe",
            "",
        ),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [LLAMA3 | {"invert": True}, BYTES]}}, "default", "Split None"),
        ({"normalizer": {"type": "NFC"}}, "gpt-2", ""),
        ({"normalizer": {"type": "Lowercase"}}, "gpt-2", "does not apply the normalizer Lowercase"),
        ({"model": {"ignore_merges": True}}, "gpt-2", "ignore_merges is True, and False in llama.cpp's 'gpt-2'"),
    ],
)
def test_pre_tokenizers(tmp_path, caplog, changes, pre, logged):
    tokenizer = said()
    changes = {key: tokenizer["model"] | value if key == "model" else value for key, value in changes.items()}
    assert made(tmp_path, tokenizer | changes)["tokenizer.ggml.pre"] == pre
    assert len(caplog.records) == bool(logged) and (not logged or re.search(logged, caplog.text))


def test_spaces_that_are_made_otherwise(tmp_path, caplog):
    assert made(tmp_path, said("llama never"))["tokenizer.ggml.add_space_prefix"] is False
    replaced = said("llama prepend")
    replaced["normalizer"] = replaced["normalizer"]["normalizers"][1]
    assert made(tmp_path, replaced)["tokenizer.ggml.add_space_prefix"] is False and not caplog.records
    cut = said("llama first")
    cut["pre_tokenizer"]["split"] = True
    assert made(tmp_path, cut)["tokenizer.ggml.add_space_prefix"] is True and "Metaspace None. Some text becomes" in caplog.text


WORD_PIECE = {"model": {"type": "WordPiece", "vocab": {"a": 0}}}
UNIGRAM = {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}


@pytest.mark.parametrize(
    ("tokenizer", "kind"),
    [
        (WORD_PIECE, "WordPiece"),
        (UNIGRAM, "Unigram"),
        ({"model": said()["model"] | {"end_of_word_suffix": "</w>"}}, "BPE with end_of_word_suffix"),
        ({"model": said()["model"]}, "BPE of neither bytes nor byte_fallback"),
        ({"model": said()["model"] | {"byte_fallback": True}}, "BPE with byte_fallback, and lacks tokens of bytes"),
    ],
)
def test_other_kinds_are_left_out(tmp_path, caplog, tokenizer, kind):
    with io.directory.Writer(tmp_path / "model") as writer:
        writer.add("model.embed_tokens.weight", torch.randn(8, 32))
        writer.config = CONFIG | {"vocab_size": 8}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert convert(tmp_path / "model", tmp_path / "m.gguf", "gguf").notes == [NO_TOKENIZER]
    found = io.detect(tmp_path / "m.gguf").settings
    assert [key for key in found if key.startswith("tokenizer.")] == ["tokenizer.ggml.model"] and found["tokenizer.ggml.model"] == "none"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and f"the tokenizer is {kind};" in record.getMessage()


def change(path, value):
    """What puts a value into a tokenizer.json, or drops what is there."""

    def change(tokenizer):
        *outer, last = path
        for key in outer:
            tokenizer = tokenizer[key]
        if value is None:
            del tokenizer[last]
        else:
            tokenizer[last] = value

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(["model"], None), r"tokenizer\.json lacks model"),
        (change(["model"], []), "model is .*not dict"),
        (change(["model", "vocab", "Ġ"], "1"), "vocab has 'Ġ' = '1', no id"),
        (change(["model", "vocab", "Ġ"], True), "no id of a token"),
        (change(["model", "vocab", "Ġ"], -1), "no id of a token"),
        (change(["model", "vocab", "Ġ"], 1 << 40), "no id of a token"),
        (change(["model", "vocab", "Ġ"], 3), "have the same id, 3"),
        (change(["model", "vocab", "\ud800"], 1000), "a token that is no text"),
        (change(["model", "vocab", "[PAD500]"], 501), "is what ids without a token are called"),
        (change(["model", "vocab", "Ġ"], None), "vocab has no 'Ġ'"),
        (change(["model", "merges"], None), "lacks merges"),
        (change(["model", "merges", 0], ["a"]), r"merges has \['a'\], no two tokens"),
        (change(["model", "merges", 0], ["a", 1]), "no two tokens"),
        (change(["model", "merges", 0], "a b c"), "no two tokens"),
        (change(["model", "merges", 0], "a ¡"), "vocab has no 'a¡'"),
        (change(["added_tokens", 0, "id"], 3), "added_tokens has '<unk>' = 3|have the same id, 3"),
        (change(["added_tokens", 0, "content"], "a"), "added_tokens has 'a' = "),
        (change(["added_tokens", 0], "<unk>"), "added_tokens is '<unk>', no JSON object"),
        (change(["added_tokens", 0, "id"], 2000), r"'<unk>' = 2000, and vocab_size of config\.json is 600"),
        (change(["pre_tokenizer"], []), "pre_tokenizer is .*not dict"),
        (change(["pre_tokenizer"], {}), None),
        (change(["pre_tokenizer"], {"type": "Sequence"}), "lacks pretokenizers"),
        (change(["pre_tokenizer"], {"type": "Split", "pattern": 3, "behavior": "Isolated"}), "pattern is 3, not dict"),
        (change(["post_processor"], {"type": "TemplateProcessing", "single": [1, 2]}), "post_processor is 1, no JSON object"),
    ],
)
def test_damaged_tokenizers(tmp_path, damage, message):
    tokenizer = said()
    damage(tokenizer)
    if message is None:
        assert made(tmp_path, tokenizer, 600) == {"tokenizer.ggml.model": "none"}
        return
    with pytest.raises(CheckpointError, match=message):
        made(tmp_path, tokenizer, 600)


def places(node, path=()):
    """The paths of all that lies in a JSON value, but for the tokens and merges after the first."""
    yield from [path] if path else []
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []
    for key, value in list(inner)[: 1 if path and path[-1] in ("vocab", "merges") else None]:
        yield from places(value, (*path, key))


@pytest.mark.parametrize("name", ["smaug-bpe", "llama prepend", "llama first"])
def test_junk_anywhere_is_an_error_or_harmless(tmp_path, name):
    raised = 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    for path in places(said(name)):
        for junk in (None, 3, "x", [[]], {"x": []}):
            tokenizer = said(name)
            change(path, junk)(tokenizer)
            (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
            try:
                gguf_file.pack(gguf_tokenizer.key_values(tmp_path, {}))
            except CheckpointError:
                raised += 1
    assert raised > 100


@pytest.mark.parametrize("key", ["chat_template", "bos_token", "eos_token_id", "add_bos_token"])
def test_junk_in_other_files(tmp_path, key):
    for junk in (3, "x", [[]], {"content": []}, [{"name": "x"}]):
        try:
            gguf_file.pack(made(tmp_path, tokenizer_config={key: junk}))
        except CheckpointError as error:
            assert key == "chat_template", error


def test_numbers_of_tokens(tmp_path):
    for size in ("many", 1 << 40, 10):
        with pytest.raises(CheckpointError, match=r"vocab_size of config\.json"):
            made(tmp_path, size=size)
    assert gguf_tokenizer.key_values(tmp_path / "nothing", {}) == {"tokenizer.ggml.model": "none"}


def test_every_known_pre_tokenizer_was_given_to_llama_cpp():
    assert {name for names in gguf_text.PRE_TOKENIZERS.values() for name in names.values()} == set(BYTE_LEVEL)
