"""Make gguf_tokenizers.json: small tokenizers, and the tokens that llama.cpp makes of texts with the key-values that are written of them.

    pip install llama-cpp-python tokenizers==0.23.3; python tests/golden/make_gguf_tokenizers.py

The tokenizers are trained by the tokenizers library on this file, in the shapes that models have: of the pre-tokenizers the regular
expressions of Llama 3, Qwen 2, Mistral Nemo, GPT-4o, SmolLM and GPT-2; as Llama 2's has it, all pairs that make a piece are merges, in the
order of the pieces. The file was made by llama.cpp as in llama-cpp-python 0.3.36 (its bindings, with the library of xllamacpp).
`sha256` is of the key-values as packed, so that a test can tell whether llama.cpp has seen those that are written today.
"""

import hashlib
import json
import tempfile
from pathlib import Path

from llama_cpp import llama_cpp
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qkernels.io import gguf_file, gguf_tokenizer

HERE = Path(__file__).parent
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + OTHERS
UPPER, LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = rf"{UPPER}*{LOWER}+|{UPPER}+{LOWER}*|\p{{N}}" + OTHERS.replace(r"[\r\n]*", r"[\r\n/]*", 1)
GPT4O = TEKKEN.replace(f"{LOWER}+|", f"{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|", 1)
GPT4O = GPT4O.replace(rf"{LOWER}*|\p{{N}}", rf"{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{{N}}{{1,3}}")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(regex):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


# llama.cpp's name -> the pre-tokenizer, and whether merges are ignored for a word that is a token
BYTE_LEVEL = {
    "gpt-2": (BYTES, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), False),
    "llama-bpe": (split(LLAMA3), True),
    "smaug-bpe": (split(LLAMA3), False),
    "qwen2": (split(LLAMA3.replace("{1,3}", "")), False),
    "tekken": (split(TEKKEN), True),
    "gpt-4o": (split(GPT4O), False),
}
TEXTS = [
    "def f(x):\n    return x ** 2  # I'm\n",
    "Hello World",
    "  two spaces",
    "tab\tand\r\nnewlines\n\n\nx",
    "1234567 12 3.14159",
    "Grüße, été, 漢字かな привет 🙂👍🏽",
    "it's they'LL DON'T HTTPServer camelCase",
    "a</s>b <tool> c<tool>d",
    "",
    " ",
    "   ",
    "x   y    z     w",
    "cafe\u0301 ǅ ʰ ½ ² Ⅷ ٣٤",
    "foo/bar//baz\\n path/\n/x",
    "</s> in the midst <s>x",
    "quantised weights of a checkpoint: the kernels",
]


def corpus():
    return [Path(__file__).read_text(), "it's they'll I'm HTTPServer camelCase über été 123 4567 " * 5]


def finished(tokenizer):
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return tokenizer


def byte_level(pre_tokenizer, ignore_merges):
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False))
    return finished(made)


def of_characters(prefix, all_pairs=True):
    """BPE with bytes for characters without a token; prefix: "prepend", of the normalizer, else the pre-tokenizer's scheme."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=450, special_tokens=first, limit_alphabet=70, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    pieces = [*dict.fromkeys(left + right for left, right in merges), "▁▁", "▁▁▁", "▁▁▁▁"]
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(pieces[-3:])}
    pairs = [(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece))]
    pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab] if all_pairs else [*merges, ("▁", "▁"), ("▁▁", "▁▁")]
    made = Tokenizer(models.BPE(vocab=vocab, merges=pairs, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if prefix == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    return finished(made)


def of_llama_cpp(settings, folder):
    """The tokens of each text."""
    path = folder / "vocabulary.gguf"
    settings = gguf_file.KeyValues({"general.architecture": "llama", **settings}, settings.types)
    sizes = {"context_length": 8, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32, "attention.head_count": 1}
    settings |= {f"llama.{key}": value for key, value in sizes.items()} | {"llama.attention.layer_norm_rms_epsilon": 1e-5}
    path.write_bytes(gguf_file.header(gguf_file.pack(settings), [], 32))
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = True
    vocabulary = llama_cpp.llama_model_get_vocab(llama_cpp.llama_model_load_from_file(str(path).encode(), options))
    found = []
    for text in TEXTS:
        said = text.encode()
        ids = (llama_cpp.llama_token * (len(said) + 8))()
        count = llama_cpp.llama_tokenize(vocabulary, said, len(said), ids, len(ids), True, True)
        found.append(list(ids[:count]))
    return found


def main():
    made = {name: byte_level(*how) for name, how in BYTE_LEVEL.items()}
    made |= {f"llama {prefix}": of_characters(prefix) for prefix in ("prepend", "first", "never")}
    made["llama of learnt pairs"] = of_characters("prepend", all_pairs=False)
    tokenizers = {}
    llama_cpp.llama_backend_init()
    for name, tokenizer in made.items():
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(f"{folder}/tokenizer.json", pretty=False)
            said = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            (Path(folder) / "tokenizer_config.json").write_text(json.dumps(said))
            settings = gguf_tokenizer.key_values(Path(folder), {})
            tokenizers[name] = {
                "sha256": hashlib.sha256(b"".join(gguf_file.pack(settings))).hexdigest(),
                "tokens": of_llama_cpp(settings, Path(folder)),
                "tokenizer.json": json.loads(tokenizer.to_str()),
            }
    said = {"texts": TEXTS, "tokenizer_config.json": said, "tokenizers": tokenizers}
    (HERE / "gguf_tokenizers.json").write_text(json.dumps(said, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
