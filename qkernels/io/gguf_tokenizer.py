"""The tokenizer of a Hugging Face directory as key-values of a GGUF file, with which llama.cpp takes and gives text.

Of the tokenizers that tokenizer.json describes, two kinds are llama.cpp's as well:

    "gpt2"    byte-level BPE (Llama 3, Qwen, GPT-2): tokens, merges, and the name of the regular expressions that cut text into words
    "llama"   BPE of characters, with bytes for those that have no token (Llama 2, Mistral 7B): tokens, and scores in place of merges

Source: gguf-py's constants.py; what llama.cpp's llama-vocab.cpp does with the key-values.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkernels.errors import CheckpointError
from qkernels.io import gguf_text
from qkernels.io.gguf_file import KeyValues
from qkernels.io.gguf_text import Merges, Steps
from qkernels.io.settings import Settings
from qkernels.io.shards import MOST_JSON, read_json

log = logging.getLogger("qkernels")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # the types of a token
_MOST_TOKENS = 1 << 24  # as scores are float32
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_STEPS = (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"))
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' name of a special token -> llama.cpp's


@dataclass(frozen=True)
class _Directory:
    """What a model's directory says about its tokenizer; `tokenizer` and `model` are tokenizer.json and the model in it."""

    path: Path
    tokenizer: Settings
    model: Settings
    stated: tuple[Mapping[str, Any], ...]  # the other files, the one to believe first

    def first(self, key: str) -> Any:
        return next((value for file in self.stated if (value := file.get(key)) is not None), None)

    def steps(self, part: str, list_key: str) -> list[Settings]:
        """A normalizer, pre-tokenizer or post-processor as what it does one after the other."""
        said = self.tokenizer.take(part, of=dict, default={})
        where = f"{self.tokenizer.where}: {part}"
        several = said.get("type") == "Sequence"
        steps = Settings(said, where).take(list_key, of=list) if several else [said] if said else []
        return [Settings(step, where) for step in steps]

    def warn(self, message: str) -> None:
        log.warning("%s: %s", self.path, message)


def key_values(path: Path, config: Mapping[str, Any]) -> KeyValues:
    """The tokenizer of a directory; that there is none where it has no tokenizer.json, or one of another kind, which is logged.

    config   config.json, whose vocab_size the tokens are padded to
    What llama.cpp does otherwise than the tokenizer is logged too, and the file is written nevertheless: text that it makes is right in
    any case, and a pre-tokenizer can be named as it runs (--override-kv tokenizer.ggml.pre=str:NAME).
    Raises CheckpointError for files that are no tokenizer, or one of more tokens than the model has.
    """
    none = KeyValues({"tokenizer.ggml.model": "none"})
    if not (path / "tokenizer.json").is_file():
        return none
    names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    files = [read_json(path / name) for name in names if (path / name).is_file()]
    tokenizer = Settings(read_json(path / "tokenizer.json"), str(path / "tokenizer.json"))
    model = tokenizer.inner("model")
    if model is None:
        raise CheckpointError(f"{tokenizer.where} lacks model")
    d = _Directory(path, tokenizer, model, (*files, config))
    normalized, cut = (tuple(map(gguf_text.step, d.steps(*keys))) for keys in _STEPS)
    vocab = model.take("vocab", of=(dict, list), default={})
    kind = _kind(model, vocab, cut)
    if kind not in ("gpt2", "llama"):
        d.warn(f"the tokenizer is {kind}; byte-level BPE and BPE with byte_fallback can be in a GGUF file, so it is left out")
        return none
    found = _tokens(d, kind, dict(vocab), config)
    if kind == "gpt2":
        ignored = model.take("ignore_merges", of=bool, default=False)
        found["tokenizer.ggml.pre"] = gguf_text.pre_tokenizer(d.warn, ignored, normalized, cut)
    else:
        found["tokenizer.ggml.add_space_prefix"] = gguf_text.space_prefix(d.warn, normalized, cut)
    found |= _templates(d)
    return found


def _kind(model: Settings, vocab: Any, cut: Steps) -> str:
    """ "gpt2", "llama", or what else it is."""
    kind = model.take("type", of=str, default="of no type")
    affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.take(key, of=str, default="")]
    if kind != "BPE" or affixes or not isinstance(vocab, dict):
        return " with ".join([kind, *affixes])
    if model.take("byte_fallback", of=bool, default=False):
        # without all of them llama.cpp ends at the first character that has no token
        return "llama" if all(f"<0x{byte:02X}>" in vocab for byte in range(256)) else "BPE with byte_fallback, and lacks tokens of bytes"
    return "gpt2" if any(name == "ByteLevel" for name, _ in cut) else "BPE of neither bytes nor byte_fallback"


# -- tokens --------------------------------------------------------------------------------------------------------------------------


def _tokens(d: _Directory, kind: str, vocab: dict[str, int], config: Mapping[str, Any]) -> KeyValues:
    """Tokens, merges, and the special tokens."""
    wrong = next((item for item in vocab.items() if type(item[1]) is not int or not 0 <= item[1] < _MOST_TOKENS), None)
    if wrong:
        raise CheckpointError(f"{d.model.where}: vocab has {wrong[0]!r:.80} = {wrong[1]!r:.80}, no id of a token")
    added = _added(d, vocab)
    merges, around = _merges(d.model, vocab), _around(d)
    ids = _special_ids(d, vocab, around)
    tokens = [f"[PAD{id}]" for id in range(_size(d, vocab, config))]
    types = [UNUSED] * len(tokens)
    for token, id in vocab.items():
        tokens[id] = token
        types[id] = NORMAL if token not in added else CONTROL if added[token] else USER_DEFINED
        if kind == "llama" and _BYTE.fullmatch(token):
            types[id] = BYTE
    if kind == "llama" and ids.get("unk") not in (None, ids.get("bos"), ids.get("eos")):
        types[ids["unk"]] = UNKNOWN
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{d.tokenizer.where} has a token [PAD…], which is what ids without a token are called")
    found = KeyValues({"tokenizer.ggml.model": kind, "tokenizer.ggml.pre": "default"})
    found |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if kind == "llama":
        others = {token for token, type in zip(tokens, types) if type != NORMAL}
        found["tokenizer.ggml.scores"] = gguf_text.scores(d.warn, tokens, merges, others)
    found["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
    found.types |= {f"tokenizer.ggml.{name}": "[string]" for name in ("tokens", "merges")} | {"tokenizer.ggml.token_type": "[i32]"}
    return KeyValues(
        found | {f"tokenizer.ggml.{_IDS[name]}_token_id": id for name, id in ids.items()} | _adds(d, vocab, ids, around), found.types
    )


def _distinct(vocab: Mapping[str, int], where: str) -> None:
    if len(by_id := {id: token for token, id in vocab.items()}) < len(vocab):
        token, id = next((token, id) for token, id in vocab.items() if by_id[id] != token)
        raise CheckpointError(f"{where}: {token!r:.80} and {by_id[id]!r:.80} have the same id, {id}")


def _added(d: _Directory, vocab: dict[str, int]) -> dict[str, bool]:
    """Added tokens, which are put into the vocabulary, and whether each is special."""
    added = {}
    for said in d.tokenizer.take("added_tokens", of=list, default=[]):
        token = Settings(said, f"{d.tokenizer.where}: added_tokens")
        content, id = token.take("content", of=str), token.take("id", of=int)
        if not 0 <= id < _MOST_TOKENS or vocab.setdefault(content, id) != id:
            raise CheckpointError(f"{token.where} has {content!r:.80} = {id}; vocab has {vocab.get(content)}")
        added[content] = token.take("special", of=bool, default=False)
    _distinct(vocab, d.tokenizer.where)
    try:
        "".join(vocab).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{d.tokenizer.where} has a token that is no text: {error}") from error
    return added


def _size(d: _Directory, vocab: Mapping[str, int], config: Mapping[str, Any]) -> int:
    """How many tokens the file has: as many as the model."""
    largest, token = max(((id, token) for token, id in vocab.items()), default=(-1, ""))
    size = config.get("vocab_size", largest + 1)
    if type(size) is not int or not largest < size <= _MOST_TOKENS:
        raise CheckpointError(f"{d.tokenizer.where} has {token!r:.80} = {largest}, and vocab_size of config.json is {size!r:.80}")
    return size


def _merges(model: Settings, vocab: Mapping[str, int]) -> Merges:
    """Pairs of tokens that make a token, in the order in which they are tried."""
    merges = []
    for said in model.take("merges", of=list):
        pair = said.split(" ") if isinstance(said, str) else said
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and " " not in part for part in pair):
            raise CheckpointError(f"{model.where}: merges has {said!r:.80}, no two tokens without a space")
        left, right = pair
        if missing := [token for token in (left, right, left + right) if token not in vocab]:
            raise CheckpointError(f"{model.where}: merges has {said!r:.80}, and vocab has no {missing[0]!r:.80}")
        merges.append((left, right))
    return merges


# -- text ----------------------------------------------------------------------------------------------------------------------------


def _around(d: _Directory) -> dict[str, Any]:
    """The tokens that the post-processor puts in front of text and behind it, under "bos" and "eos"; None where it does not."""
    templates = [step.take("single", of=list, default=[]) for step in d.steps("post_processor", "processors")]
    single = [Settings(piece, f"{d.tokenizer.where}: post_processor") for piece in next(filter(None, templates), [])]
    ends = [piece.take("SpecialToken", of=dict, default={}).get("id") for piece in (single[:1] + single[-1:] if len(single) > 1 else [])]
    return dict(zip(("bos", "eos"), ends or (None, None)))


def _special_ids(d: _Directory, vocab: Mapping[str, int], around: Mapping[str, Any]) -> dict[str, int]:
    """The special tokens by transformers' names: where a file names the token, that, else the first id that one states."""
    found, known = {}, set(vocab.values())
    for name in _IDS:
        said, stated = d.first(f"{name}_token") or around.get(name), d.first(f"{name}_token_id")
        token = said.get("content") if isinstance(said, Mapping) else said
        id = vocab.get(token) if isinstance(token, str) else None
        if id is None:
            id = stated[0] if isinstance(stated, list) and stated else stated
        if type(id) is int and id in known:  # -1 and the like stand for none
            found[name] = id
    return found


def _adds(d: _Directory, vocab: Mapping[str, int], ids: Mapping[str, int], around: Mapping[str, Any]) -> dict[str, bool]:
    """Whether text gets bos in front and eos behind: what tokenizer_config.json says, else what the post-processor does."""
    found = {}
    for name, token in around.items():
        puts = isinstance(token, str) and vocab.get(token) == ids.get(name, -1)
        if token is not None and not puts:
            d.warn(f"llama.cpp puts no token around text but bos and eos, and the tokenizer {token!r:.80}")
        stated = d.first(f"add_{name}_token")
        found[f"tokenizer.ggml.add_{name}_token"] = name in ids and (stated if isinstance(stated, bool) else puts)
    return found


def _templates(d: _Directory) -> dict[str, Any]:
    """Chat templates by llama.cpp's keys: the default one, and others by their names."""
    file = d.path / "chat_template.jinja"
    said = d.first("chat_template")
    if file.is_file():
        try:
            with file.open("rb") as opened:
                said = opened.read(MOST_JSON).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {file}: {error}") from error
    found = {}
    several = [{"name": "default", "template": said}] if isinstance(said, str) else said or []
    for template in Settings({"chat_template": several}, str(d.path)).take("chat_template", of=list):
        template = Settings(template, f"{d.path}: chat_template")
        name, text = template.take("name", of=str), template.take("template", of=str)
        found["tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"] = text
    return found
